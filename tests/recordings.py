"""Audio files as people have them, made with FFmpeg."""

import io
import struct

import av
import numpy as np

RATE = 44_100


def signal(seconds=2.0, rate=RATE):
    """A chord that grows louder: `(samples,)`."""
    time = np.arange(int(seconds * rate)) / rate
    chord = sum(np.sin(2 * np.pi * pitch * time) for pitch in (220, 330, 550)) / 3
    return (0.6 * chord * (0.3 + 0.7 * time / seconds)).astype("f4")


def encode(container, codec, samples, rate=RATE, channels=1, options=(), pipe=False, quality=None, path=None):
    """The content of a file with `samples` in all channels, or `(channels, samples)` in each its own.

    Through a pipe, its header is not completed.
    """
    content = io.BytesIO()
    content.seekable = lambda: not pipe
    with av.open(str(path) if path else content, "w", format=container, options=dict(options)) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.layout = {1: "mono", 2: "stereo"}[channels]
        if quality is None:
            stream.bit_rate = 12_200 if codec == "libopencore_amrnb" else 192_000
        else:
            stream.codec_context.options = {"global_quality": str(118 * quality), "flags": "+qscale"}
        planes = np.ascontiguousarray(np.broadcast_to(samples, (channels, samples.shape[-1])))
        frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=stream.layout.name)
        frame.rate, frame.pts = rate, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)
    return path.read_bytes() if path else content.getvalue()


def riff(samples, rate=RATE, size=None):
    """A WAV of 16 bits whose header says a size of its own."""
    data = (samples * 32767).astype("<i2").tobytes()
    declared = len(data) if size is None else size
    form = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16) + b"data"
    return b"RIFF" + struct.pack("<I", min(36 + declared, 2**32 - 1)) + form + struct.pack("<I", declared) + data


def id3(size=500):
    """An empty ID3 tag."""
    return b"ID3\x04\0\0" + bytes([0, 0, size >> 7, size & 127]) + bytes(size)
