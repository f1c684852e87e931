"""The HTTP API: OpenAI's Images API, and the commands that it does not have under ``/dalle2``."""
