import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_softmoa import SoftMoAConfig
from peft_softmoa.targets.layers import find_layers, find_module, is_norm, is_repeated

D, F = 8, 20


def layer(**children):
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def separate(width=D, reads=None):
    reads = reads or width
    names = ("to_keys", "to_values", "to_queries")
    return layer(**{name: nn.Linear(reads, width) for name in names}, back=nn.Linear(width, width))


def widen_and_narrow(first=F, narrowed=F):
    return {"expand": nn.Linear(D, first), "shrink": nn.Linear(narrowed, D)}


def blocks_of(*layers):
    """Names of attentions and feed-forwards in the first layer, as pairs of entry and exit."""
    [stack] = find_layers(layer(tower=nn.ModuleList(layers)))
    found = stack[0]
    assert found.name == "tower.0" and found.width == D
    return tuple(
        [(block.entry.removeprefix("tower.0."), block.exit.removeprefix("tower.0.")) for block in blocks]
        for blocks in (found.attentions, found.ffns)
    )


ATTENTIONS = {
    "separate": (lambda: separate(), ("mix", "mix")),
    "with a narrow gate in front": (
        lambda: layer(gate=nn.Linear(2, 8), a=nn.Linear(D, D), b=nn.Linear(D, D), c=nn.Linear(D, D), o=nn.Linear(D, D)),
        ("mix", "mix"),
    ),
    "that reads another width": (lambda: separate(reads=24), ("mix", "mix")),
    "fused": (lambda: layer(all=nn.Linear(D, 3 * D), back=nn.Linear(D, D)), ("mix", "mix")),
    "keys and values fused": (
        lambda: layer(q=nn.Linear(D, D), kv=nn.Linear(D, 2 * D), back=nn.Linear(D, D)), ("mix", "mix")
    ),
    "wider heads": (
        lambda: layer(q=nn.Linear(D, 16), k=nn.Linear(D, 16), v=nn.Linear(D, 16), o=nn.Linear(16, D)), ("mix", "mix")
    ),
    "with the norm inside": (lambda: layer(norm=nn.LayerNorm(D), **dict(separate().named_children())),
                             ("mix.to_keys", "mix")),
    "with norms of heads inside": (lambda: layer(norm=nn.LayerNorm(4), **dict(separate().named_children())),
                                   ("mix", "mix")),
    "with the norm inside and a projection of positions": (
        lambda: layer(
            norm=nn.LayerNorm(D), positions=layer(project=nn.Linear(D, D)), inner=separate(), back=nn.Linear(D, D)
        ),
        ("mix.inner.to_keys", "mix"),
    ),
    "with dropout and norm after it": (
        lambda: layer(
            self=layer(q=nn.Linear(D, D), k=nn.Linear(D, D), v=nn.Linear(D, D)),
            output=layer(dense=nn.Linear(D, D), dropout=nn.Dropout(0.1), norm=nn.LayerNorm(D)),
        ),
        ("mix", "mix.output.dense"),
    ),
    "in a wrapping": (lambda: layer(norm=nn.LayerNorm(D), inner=separate(), dropout=nn.Dropout(0.1)),
                      ("mix.inner", "mix.inner")),
}  # fmt: skip


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention(kind):
    make, wanted = ATTENTIONS[kind]
    attentions, ffns = blocks_of(*(layer(mix=make(), **widen_and_narrow()) for _ in range(2)))
    assert attentions == [wanted] and ffns == [("expand", "shrink")]


FFNS = {
    "two modules of the layer": (lambda: widen_and_narrow(), [("expand", "shrink")]),
    "one module": (lambda: {"change": layer(**widen_and_narrow())}, [("change", "change")]),
    "one module with dropout at its end": (
        lambda: {"change": layer(**widen_and_narrow(), drop=nn.Dropout(0.1))},
        [("change.expand", "change.shrink")],
    ),
    "as wide inside": (lambda: {"change": layer(**widen_and_narrow(D, D))}, [("change", "change")]),
    "gated": (
        lambda: {"change": layer(up=nn.Linear(D, F), gate=nn.Linear(D, F), down=nn.Linear(F, D))},
        [("change", "change")],
    ),
    "gated by halves": (lambda: {"change": layer(**widen_and_narrow(2 * F, F))}, [("change", "change")]),
    "the narrowing one defined first": (
        lambda: {"change": layer(down=nn.Linear(F, D), up=nn.Linear(D, F))},
        [("change", "change")],
    ),
    "one module with dropout, as wide inside": (
        lambda: {"change": layer(**widen_and_narrow(D, D), drop=nn.Dropout(0.1))},
        [("change.expand", "change.shrink")],
    ),
    "two modules of two modules": (
        lambda: {"intermediate": layer(dense=nn.Linear(D, F)), "output": layer(dense=nn.Linear(F, D))},
        [("intermediate.dense", "output.dense")],
    ),
    "two half-steps": (
        lambda: {"one": layer(**widen_and_narrow()), "two": layer(**widen_and_narrow())},
        [("one", "one"), ("two", "two")],
    ),
    "a convolution beside it": (
        lambda: {"local": layer(**widen_and_narrow(2 * F, F), conv=nn.Conv1d(F, F, 3)), **widen_and_narrow()},
        [("expand", "shrink")],
    ),
    "no feed-forward": (lambda: {"project": nn.Linear(D, D)}, []),
    "an adapter is none": (lambda: {"down": nn.Linear(D, 2), "up": nn.Linear(2, D)}, []),
}


@pytest.mark.parametrize("kind", FFNS)
def test_feed_forward(kind):
    make, wanted = FFNS[kind]
    attentions, ffns = blocks_of(*(layer(mix=separate(), **make()) for _ in range(2)))
    assert attentions == [("mix", "mix")] and ffns == wanted


def test_cross_attention_comes_second():
    attentions, _ = blocks_of(layer(own=separate(), other=separate(), **widen_and_narrow()))
    assert attentions == [("own", "own"), ("other", "other")]


def test_widths_that_blocks_read():
    layers = [layer(mix=separate(reads=reads), **widen_and_narrow()) for reads in (24, D)]
    [stack] = find_layers(layer(tower=nn.ModuleList(layers)))
    assert [found.attentions[0].reads for found in stack] == [24, D]
    assert [found.width for found in stack] == [found.ffns[0].reads for found in stack] == [D, D]


def test_layers_of_different_classes():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = separate()

    [stack] = find_layers(layer(tower=nn.ModuleList([First(), layer(mix=separate())])))
    assert [found.name for found in stack] == ["tower.0", "tower.1"]


def test_what_is_no_stack():
    convolutions = nn.ModuleList([layer(conv=nn.Conv1d(D, D, 3)) for _ in range(3)])
    some = nn.ModuleList([layer(mix=separate()), layer(conv=nn.Conv1d(D, D, 3))])
    assert find_layers(layer(convolutions=convolutions, some=some, none=nn.ModuleList())) == []


def test_stacks_in_a_stack():
    stages = [
        layer(blocks=nn.ModuleList([layer(mix=separate(), **widen_and_narrow())]), down=nn.Linear(D, D))
        for _ in range(2)
    ]
    names = [[found.name for found in stack] for stack in find_layers(layer(stages=nn.ModuleList(stages)))]
    assert names == [["stages.0.blocks.0"], ["stages.1.blocks.0"]]


@pytest.mark.parametrize(
    "config", [LoraConfig(target_modules=["q_proj", "fc1"]), SoftMoAConfig(placement="both")], ids=["LoRA", "Soft-MoA"]
)
def test_adapters_change_nothing(config):
    from families import build

    model = build("Whisper, classification")
    wanted = find_layers(model)
    base = get_peft_model(model, config).get_base_model()
    assert find_layers(base) == wanted
    attention = find_module(base, "encoder.layers.0.self_attn.q_proj")
    assert isinstance(attention, nn.Linear)


def test_is_norm():
    assert is_norm(nn.LayerNorm(4)) and is_norm(nn.RMSNorm(4))
    assert not is_norm(nn.BatchNorm1d(4)) and not is_norm(nn.LayerNorm(4, elementwise_affine=False))
    assert not is_norm(nn.Linear(4, 4))


def test_what_is_repeated():
    """A list of modules of one class with parts of their own; plain linear layers are no blocks."""

    def block():
        return nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    assert is_repeated(nn.ModuleList([block(), block()]))
    assert not is_repeated(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
    assert not is_repeated(nn.ModuleList([block(), nn.Sequential()]))
    assert not is_repeated(nn.ModuleList([block(), nn.Linear(2, 2)]))
    assert not is_repeated(nn.ModuleList())
    assert is_repeated(nn.Sequential(block(), block()))
    assert not is_repeated(block())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(D, D) for _ in range(4))

    def forward(self, tokens):
        heads = [linear(tokens).unsqueeze(1) for linear in (self.query, self.key, self.value)]
        return self.out(nn.functional.scaled_dot_product_attention(*heads).squeeze(1))


class SequentialLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.up, self.down = Attention(), nn.Linear(D, F), nn.Linear(F, D)

    def forward(self, tokens):
        tokens = tokens + self.attention(tokens)
        return tokens + self.down(self.up(tokens).relu())


def test_layers_in_a_sequential_are_found():
    encoder = nn.Sequential(nn.Linear(4, D), nn.Sequential(*(SequentialLayer() for _ in range(3))))
    [layers] = find_layers(encoder)
    assert [layer.name for layer in layers] == ["1.0", "1.1", "1.2"]
    model = get_peft_model(encoder, SoftMoAConfig(placement="both", init_weights=False))
    assert set(model.targeted_module_names) == {f"1.{i}.{block}" for i in range(3) for block in ("attention", "down")}
    tokens = torch.randn(2, 5, 4)
    with model.disable_adapter():
        base = model(tokens)
    assert not torch.equal(model(tokens), base)
