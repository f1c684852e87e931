# A server in a container.
#
#   docker build -t dalle2_jax .                                       on CPUs
#   docker build -t dalle2_jax --build-arg EXTRAS=serve,cuda .         on NVIDIA GPUs (run it with --gpus all)
#   docker run -p 127.0.0.1:8000:8000 -v ./keys:/keys:ro dalle2_jax serve --system shapes --host 0.0.0.0 --api_keys /keys
#
# The CUDA libraries are those of the wheels of jax[cuda12]; the host needs the driver only.
FROM python:3.12-slim AS build
ARG EXTRAS=serve
WORKDIR /source
COPY setup.cfg setup.py pyproject.toml MANIFEST.in README.md LICENSE train.py sample.py ./
COPY configs configs
COPY dalle2_jax dalle2_jax
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir ".[${EXTRAS}]"

FROM python:3.12-slim
RUN useradd --uid 1000 --create-home dalle2 && mkdir -p /home/dalle2/.cache && chown dalle2 /home/dalle2/.cache
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/dalle2
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=300s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["dalle2"]
CMD ["serve", "--help"]
