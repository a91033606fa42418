"""The command `peft-softmoa`: a module for each verb, with `make_parser()` and `main(arguments)`.

A verb parses, calls a function that can be imported, and prints.
"""

# What each verb does, as the help says it.
VERBS: dict[str, str] = {
    "train": "Train an adapter, evaluate it, and save it with its card.",
    "evaluate": "Evaluate an adapter on a dataset.",
    "cross-validate": "Train once for each fold of a dataset, and test it there.",
    "classify": "Say what is heard in audio of any length, window by window: files, or raw PCM from a pipe.",
    "targets": "Show what an adapter would adapt in a model, and how many parameters it would train.",
    "check": "Show what somebody's adapter would change, from its files alone, or refuse it.",
    "inspect": "Write a report of what the experts of an adapter do.",
    "export": "Write a model with its adapter as an ONNX file, and compare it with PyTorch.",
    "recipes": "List the training recipes and Accelerate configs that come with the package, or print one.",
    "demo": "Train an adapter on synthesised sounds and use it, in a minute or two, without a network.",
}
