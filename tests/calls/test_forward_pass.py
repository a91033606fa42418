"""What belongs to a call is seen by that call alone: other threads, calls within calls, and copies have their own."""

import copy
import os
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import tiny_ast_config
from families import FAMILIES, build
from peft import get_peft_model
from transformers import ASTForAudioClassification

from peft_softmoa import SoftMoAConfig
from peft_softmoa.calls.forward_pass import find_passes, make_passes
from peft_softmoa.calls.one_pass import CallKey
from peft_softmoa.inspection import record_routing

# Of each of eight threads.
CALLS = int(os.environ.get("SOFTMOA_CALLS", 25))
THREADED = [
    ("Wav2Vec2", "ffn"),
    ("Whisper, classification", "ffn"),
    ("SEW-D", "attention"),
    ("CLAP", "attention"),
    ("Granite Speech", "attention"),
]


def adapted(name, placement="attention", **options):
    config = SoftMoAConfig(placement=placement, num_experts=3, r=2, init_weights=False, **options)
    return get_peft_model(build(name), config).eval()


def clips(name):
    """Batches of one, and of clips of different length."""
    family = FAMILIES[name]
    short, long = family.lengths
    return [family.inputs(lengths) for lengths in ([short], [long], [short, long], [long, short])]


@torch.no_grad()
def encode(name, model, batch):
    return FAMILIES[name].encode(model.get_base_model(), batch)


@pytest.fixture
def eager_threads():
    """Threads that take turns as often as they can."""
    interval, number = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(number)


@pytest.mark.parametrize("name, placement", THREADED)
def test_threads_do_not_see_each_others_calls(name, placement, eager_threads):
    model, batches = adapted(name, placement), clips(name)

    def run(batch):
        with torch.no_grad():
            return model(**batch)

    def tokens(output):
        return next(value for value in output.values() if isinstance(value, torch.Tensor))

    wanted = [tokens(run(batch)) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda number: tokens(run(batches[number % len(batches)])), range(8 * CALLS)))
    # In threads the frozen model's own products differ by a last bit in one of some thousand calls, with LoRA as well.
    for number, output in enumerate(given):
        torch.testing.assert_close(output, wanted[number % len(batches)], rtol=1e-5, atol=1e-6)
    assert find_passes(model)[0].open == []


def test_two_threads_within_one_layer(eager_threads):
    """Both have entered the block before either of them leaves it."""
    model, batches = adapted("Wav2Vec2", "ffn"), clips("Wav2Vec2")[:2]
    wanted = [encode("Wav2Vec2", model, batch) for batch in batches]
    barrier = threading.Barrier(2)
    layer = model.get_base_model().encoder.layers[0].feed_forward
    handle = layer.intermediate_act_fn.register_forward_hook(lambda *_: (barrier.wait(20), None)[1])
    with ThreadPoolExecutor(2) as pool:
        given = list(pool.map(lambda batch: encode("Wav2Vec2", model, batch), batches))
    handle.remove()
    assert all(torch.equal(one, other) for one, other in zip(given, wanted))


@pytest.mark.parametrize("name, placement", [("Wav2Vec2", "ffn"), ("SEW-D", "attention")])
def test_a_call_within_a_call(name, placement):
    """In a hook of each module, before it runs and after it."""
    model = adapted(name, placement)
    outer, inner = clips(name)[2], clips(name)[1]
    wanted, wanted_inner = encode(name, model, outer), encode(name, model, inner)
    base, given, running = model.get_base_model(), [], []

    def call(module, *args):
        if not running:
            running.append(True)
            given.append(encode(name, model, inner))
            running.clear()

    for path, module in base.named_modules():
        for register in (module.register_forward_pre_hook, module.register_forward_hook):
            handle = register(call)
            assert torch.equal(encode(name, model, outer), wanted), path
            handle.remove()
    assert given and all(torch.equal(each, wanted_inner) for each in given)
    assert find_passes(model)[0].open == []


def test_a_call_that_fails_within_a_call():
    model = adapted("Wav2Vec2", "ffn")
    outer, inner = clips("Wav2Vec2")[:2]
    wanted = encode("Wav2Vec2", model, outer)
    layer, running = model.get_base_model().encoder.layers[0].feed_forward, []

    def fail(module, args, output):
        if running:
            raise RuntimeError("a call within a call")
        running.append(True)
        with pytest.raises(RuntimeError, match="within a call"):
            encode("Wav2Vec2", model, inner)
        running.clear()

    layer.intermediate_act_fn.register_forward_hook(fail)
    assert torch.equal(encode("Wav2Vec2", model, outer), wanted)
    assert find_passes(model)[0].open == []


def two_adapters():
    torch.manual_seed(0)
    fields = {"init_weights": False, "modules_to_save": ["classifier"], "label_names": ["a", "b"]}
    model = get_peft_model(ASTForAudioClassification(tiny_ast_config()), SoftMoAConfig(**fields), "one")
    model.add_adapter("two", SoftMoAConfig(**fields, routing="dense", num_experts=2))
    return model.eval()


@torch.no_grad()
def test_mixed_batches_overlap(spectrograms, eager_threads):
    model = two_adapters()
    mixes = [["one", "two", "one"], ["two", "two", "one"], None]

    def run(mix):
        with torch.no_grad():
            return model(spectrograms).logits if mix is None else model(spectrograms, adapter_names=mix).logits

    wanted = [run(mix) for mix in mixes]
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda number: run(mixes[number % len(mixes)]), range(120)))
    assert all(torch.equal(output, wanted[number % len(mixes)]) for number, output in enumerate(given))
    assert torch.equal(run(None), wanted[mixes.index(None)])


@torch.no_grad()
def test_a_plain_call_within_a_mixed_one(spectrograms):
    model = two_adapters()
    plain = model(spectrograms).logits
    mixed = model(spectrograms, adapter_names=["one", "two", "two"]).logits
    given, running = [], []

    def call(module, args, output):
        if not running:
            running.append(True)
            given.append(model(spectrograms).logits)
            running.clear()

    layers = model.get_base_model().audio_spectrogram_transformer.layers
    handles = [layer.attention.register_forward_hook(call) for layer in layers]
    assert torch.equal(model(spectrograms, adapter_names=["one", "two", "two"]).logits, mixed)
    for handle in handles:
        handle.remove()
    assert len(given) == 2 and all(torch.equal(each, plain) for each in given)


def test_records_are_those_of_one_thread(spectrograms):
    model = two_adapters()
    begun, ended = threading.Event(), threading.Event()

    def run():
        begun.wait(20)
        with torch.no_grad():
            model(spectrograms)
        ended.set()

    thread = threading.Thread(target=run)
    thread.start()
    with record_routing(model) as records:
        begun.set()
        ended.wait(20)
        assert records == []
        with torch.no_grad():
            model(spectrograms[:1])
    thread.join()
    assert [len(record.dispatch) for record in records] == [1, 1]


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda passes: pickle.loads(pickle.dumps(passes))])
def test_copies_begin_without_a_call(make_copy):
    passes = make_passes()
    passes.enter(CallKey("default", ""))
    passes.router_loss.value = torch.ones(())
    other = make_copy(passes)
    assert other.open == [] and other.router_loss.value is None and len(passes.open) == 1


def test_a_copy_of_the_model_within_a_call():
    """Such as a teacher that is updated from its student."""
    model = adapted("Wav2Vec2", "ffn")
    batch, copies = clips("Wav2Vec2")[2], []
    wanted = encode("Wav2Vec2", model, batch)
    layer = model.get_base_model().encoder.layers[0]
    handle = layer.feed_forward.register_forward_hook(lambda *_: copies.append(copy.deepcopy(model)))
    assert torch.equal(encode("Wav2Vec2", model, batch), wanted)
    handle.remove()
    copied = copies[0]
    assert find_passes(copied)[0].open == [] and find_passes(copied)[0] is not find_passes(model)[0]
    copied.get_base_model().encoder.layers[0].feed_forward._forward_hooks.clear()
    assert torch.equal(encode("Wav2Vec2", copied, batch), wanted)


def replicate(model):
    """What `torch.nn.DataParallel` makes of a model for one of its threads, on one device."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        replica._parameters = dict(module._parameters)
        replica._modules = {name: child and replicas[child] for name, child in module._modules.items()}
    return replicas[model]


def test_replicas_in_threads():
    model, batches = adapted("Wav2Vec2", "ffn"), clips("Wav2Vec2")[:2]
    wanted = [encode("Wav2Vec2", model, batch) for batch in batches]
    barrier = threading.Barrier(2)
    layer = model.get_base_model().encoder.layers[0].feed_forward
    layer.intermediate_act_fn.register_forward_hook(lambda *_: (barrier.wait(20), None)[1])
    replicas = [replicate(model), replicate(model)]
    with ThreadPoolExecutor(2) as pool:
        given = list(pool.map(lambda part: encode("Wav2Vec2", *part), zip(replicas, batches)))
    assert all(torch.equal(one, other) for one, other in zip(given, wanted))
