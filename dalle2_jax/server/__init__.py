"""Serves systems: the engine that batches requests, OpenAI's Images API over it, and the web page."""
