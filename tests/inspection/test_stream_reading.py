"""Where in the past slots read, in whole models that are fed by piece."""

import pytest
import torch
from families import build
from test_order_in_time import adapt
from test_streaming import CLOSE, PIECES, gpt2, token_model

from peft_softmoa import RoutingStream, stream_routing
from peft_softmoa.inspection import record_routing, stream_reading


def feed(model, tokens, stream=None):
    with record_routing(model) as records, stream_routing(model, stream):
        for piece in tokens.split(PIECES, dim=1):
            model(piece)
    return records


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"forgetting": True, "num_slots": 2}])
def test_pieces_are_read_as_the_whole(options):
    model, tokens = token_model(**options), torch.randn(2, sum(PIECES), 9)
    with record_routing(model) as records:
        model(tokens)
    whole, joined = stream_reading(records), stream_reading(feed(model, tokens))
    assert [reading.block for reading in joined] == ["layers.0", "layers.1", "layers.2"]
    for one, other in zip(joined, whole, strict=True):
        assert one.age.shape == one.effective_tokens.shape and one.age.shape[:2] == one.mask.shape == tokens.shape[:2]
        torch.testing.assert_close(one.age, other.age, **CLOSE)
        torch.testing.assert_close(one.effective_tokens, other.effective_tokens, rtol=1e-5, atol=1e-5)
        # The first token reads itself, and later ones more.
        assert one.age[:, 0].abs().max() < 1e-6 and (one.effective_tokens[:, 0] - 1).abs().max() < 1e-6
        assert one.age[:, -1].mean() > 1 and one.effective_tokens[:, -1].mean() > 2


@torch.no_grad()
def test_recording_changes_no_stream():
    model, tokens = token_model(forgetting=True), torch.randn(1, 12, 9)
    outputs = []
    for is_recorded in (False, True):
        with stream_routing(model):
            outputs.append([])
            for piece in tokens.split(4, dim=1):
                if is_recorded:
                    with record_routing(model), record_routing(model) as records:
                        outputs[-1].append(model(piece))
                    assert all(record.age is not None for record in records)
                else:
                    outputs[-1].append(model(piece))
    assert torch.equal(torch.cat(outputs[0], dim=1), torch.cat(outputs[1], dim=1))


@torch.no_grad()
def test_reading_with_a_cache():
    model = gpt2(forgetting=True)
    ids = torch.tensor([[1, 4, 5, 6, 2, 3]])
    with record_routing(model) as records:
        model(ids, use_cache=False)
    whole = stream_reading(records)
    with record_routing(model) as records:
        cache = None
        for piece in ids.split([3, 1, 2], dim=1):
            cache = model(piece, past_key_values=cache, use_cache=True).past_key_values
    for one, other in zip(stream_reading(records), whole, strict=True):
        torch.testing.assert_close(one.age, other.age, **CLOSE)


@torch.no_grad()
def test_what_has_no_reading_says_so():
    whole = adapt(build("Wav2Vec2"))
    with record_routing(whole) as records:
        whole(torch.randn(1, 2000))
    with pytest.raises(ValueError, match="No block of the records reads slots in order of time.*`causal=True`"):
        stream_reading(records)
    model, stream = token_model(), RoutingStream()
    with stream_routing(model, stream):
        model(torch.randn(2, 3, 9))
    with pytest.raises(ValueError, match="'layers.0' has tokens that were not recorded: record it from its first"):
        stream_reading(feed(model, torch.randn(2, sum(PIECES), 9), stream))
    stream.reset()
    records = feed(model, torch.randn(2, sum(PIECES), 9), stream)
    with pytest.raises(ValueError, match="'layers.0' are of 1 and 2 streams: empty the records"):
        stream_reading(records + feed(model, torch.randn(1, sum(PIECES), 9)))
