"""A Hub on loopback, for the clients of Hugging Face, that fails when it is told to."""

from .server import Fault, Hub, Request, loopback_hub

__all__ = ["Fault", "Hub", "Request", "loopback_hub"]
