"""The public formats of CLIP: OpenAI, OpenCLIP and transformers."""
