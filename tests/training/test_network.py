"""What an outage costs, and what is no outage, against a server on loopback."""

import email.utils
import io
import time
from types import SimpleNamespace

import fsspec
import pytest
import tenacity
from conftest import SAMPLING_RATE, write_tone
from datasets import IterableDataset
from hub import Fault, loopback_hub
from test_streams import Length

from peft_softmoa.training import AudioStream, DataOptions, ExtractFeatures, decode_audio, network, retry

NUM_CLIPS = 4


@pytest.fixture
def server():
    """A server with clips; its URLs, and the pauses of the clients, which take no time."""
    buffer = io.BytesIO()
    write_tone(buffer, format="WAV")
    files = {**{f"{index}.wav": buffer.getvalue() for index in range(NUM_CLIPS)}, "text.wav": b"this is no audio"}
    with loopback_hub() as hub:
        hub.repos["datasets/user/clips"] = files
        urls = {name: f"{hub.url}/datasets/user/clips/resolve/main/{name}" for name in files}
        yield SimpleNamespace(hub=hub, urls=urls, files=files)


@pytest.fixture
def pauses(monkeypatch):
    seen = []
    monkeypatch.setattr(tenacity.nap.time, "sleep", seen.append)
    return seen


def everything(request):
    return request.path.endswith(".wav")


def stream_of(urls, **options):
    rows = IterableDataset.from_generator(lambda: iter([{"audio": url} for url in urls]))
    return AudioStream(rows, ExtractFeatures(Length(), None, DataOptions(label_column=None, **options)))


@pytest.mark.parametrize("kind", [500, 502, 503, 429, 408, "reset", "truncated"])
def test_an_outage_costs_no_clip(server, pauses, kind):
    server.hub.faults.append(Fault(kind, everything, times=2))
    stream = stream_of(list(server.urls.values()))
    assert len(list(stream)) == NUM_CLIPS
    assert [skipped.name for skipped in stream.extract.skipped] == [server.urls["text.wav"]]
    # The client itself tries a connection that was closed once more.
    assert len(pauses) >= NUM_CLIPS + 1 and set(pauses) <= {1.0, 2.0}


@pytest.mark.parametrize("kind", [503, 429, "reset", "truncated"])
def test_an_outage_that_lasts_is_an_error_and_not_bad_audio(server, pauses, kind):
    server.hub.faults.append(Fault(kind, everything))
    with pytest.raises(ConnectionError, match=r"0.wav could not be read. Tries: 6 in \d+ s. The last one: "):
        list(stream_of(server.urls.values(), on_bad_audio="skip"))
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_a_server_that_is_not_there_is_an_outage(server, pauses):
    url = server.urls["0.wav"]
    server.hub.server_close()
    with pytest.raises(ConnectionError, match="0.wav could not be read. Tries: 6"):
        decode_audio(url, SAMPLING_RATE)


def test_an_outage_inside_of_an_archive_is_one(server, pauses):
    """There fsspec says FileNotFoundError for all that goes wrong, with the reason as its cause."""
    server.hub.faults.append(Fault(503, everything))
    with pytest.raises(ConnectionError, match="Tries: 6"):
        decode_audio(f"zip://a.wav::{server.urls['0.wav']}", SAMPLING_RATE)
    assert len(pauses) == 5


@pytest.mark.parametrize(
    "status, error, says",
    [
        (401, PermissionError, "Access to .*0.wav is denied"),
        (403, PermissionError, "Access to .*0.wav is denied"),
        (404, FileNotFoundError, "0.wav does not exist"),
        (410, FileNotFoundError, "0.wav does not exist"),
        (400, ConnectionError, "0.wav could not be read. Tries: 1 "),
    ],
)
@pytest.mark.parametrize("archive", ["", "zip://a.wav::"])
def test_a_refusal_is_an_error_at_once(server, pauses, status, error, says, archive):
    server.hub.faults.append(Fault(status, everything))
    with pytest.raises(error, match=says):
        list(stream_of([archive + server.urls["0.wav"]], on_bad_audio="skip"))
    assert pauses == []


def test_other_urls(pauses):
    buffer = io.BytesIO()
    write_tone(buffer, format="WAV")
    with fsspec.open("memory://clips/tone.wav", "wb") as file:
        file.write(buffer.getvalue())
    assert len(decode_audio("memory://clips/tone.wav", SAMPLING_RATE)) == 8000
    with pytest.raises(FileNotFoundError, match="memory://clips/nothing.wav does not exist"):
        decode_audio("memory://clips/nothing.wav", SAMPLING_RATE)
    with pytest.raises(ConnectionError, match="unheard://a.wav could not be read.*Protocol not known"):
        decode_audio("unheard://a.wav", SAMPLING_RATE)
    assert pauses == []


@pytest.mark.parametrize("status", [429, 503])
def test_the_server_says_when_to_come_again(server, pauses, status):
    server.hub.faults.append(Fault(status, everything, times=1, headers={"Retry-After": "100"}))
    decode_audio(server.urls["0.wav"], SAMPLING_RATE)
    server.hub.faults.append(Fault(status, everything, times=1, headers={"Retry-After": "0"}))
    decode_audio(server.urls["1.wav"], SAMPLING_RATE)
    assert pauses == [100.0, 100.0, 2.0]


def test_the_server_gives_a_date(server, pauses):
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    server.hub.faults.append(Fault(503, everything, times=1, headers={"Retry-After": date}))
    decode_audio(server.urls["0.wav"], SAMPLING_RATE)
    assert 10 < pauses[0] <= 100
    server.hub.faults.append(Fault(503, everything, times=1, headers={"Retry-After": "soon"}))
    server.hub.faults.reverse()
    decode_audio(server.urls["1.wav"], SAMPLING_RATE)
    assert pauses[1] == 1.0


def test_nobody_waits_beyond_the_deadline(server, pauses):
    server.hub.faults.append(Fault(429, everything, headers={"Retry-After": "86400"}))
    with pytest.raises(ConnectionError, match="Tries: 1 .*429"):
        decode_audio(server.urls["0.wav"], SAMPLING_RATE)
    assert pauses == []


def test_a_server_that_hangs_meets_the_deadline(server, monkeypatch):
    monkeypatch.setattr(network, "DEADLINE", 0.5)
    server.hub.faults.append(Fault("slow", everything, seconds=60))
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="Tries: 1 .*Timeout"):
        decode_audio(server.urls["0.wav"], SAMPLING_RATE)
    assert time.monotonic() - start < 30


def test_calls_are_tried_again(server, pauses):
    """Those of the Hub's clients: an outage, not a refusal, and not what is wrong with the call."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    def call(name):
        response = get_session().get(server.urls[name])
        hf_raise_for_status(response)
        return response.content

    server.hub.faults.append(Fault(429, everything, times=1, headers={"Retry-After": "7"}))
    assert retry(call, "text.wav") == b"this is no audio" and pauses == [7.0]
    server.hub.faults[:] = [Fault("reset", everything, times=2)]
    assert retry(call, name="text.wav") == b"this is no audio" and pauses == [7.0, 1.0, 2.0]
    pauses.clear()
    server.hub.faults[:] = [Fault(403, everything)]
    with pytest.raises(Exception, match="403"):
        retry(call, "text.wav")
    with pytest.raises(ZeroDivisionError):
        retry(lambda: 1 / 0)
    assert pauses == []
    server.hub.faults[:] = [Fault(503, everything, headers={"Retry-After": "200"})]
    with pytest.raises(Exception, match="503"):
        retry(call, "text.wav")
    assert pauses == [200.0]  # a second one would be more than five minutes in all
