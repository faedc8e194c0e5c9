# Serves the model that is mounted at /model (docs/deploying.md). For NVIDIA GPUs, build with `--build-arg TORCH_INDEX=`.
# pip then uses its own index, where torch comes with CUDA.
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /opt/deit
COPY constraints.txt ./
# In a layer of its own, so that a change of the source doesn't fetch torch again.
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} torch
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --constraint constraints.txt '.[serve,openvino]' && useradd --system --no-create-home deit \
    && mkdir /cache && chown deit /cache
# Models are exported for OpenVINO into this folder. Without it, a read-only container computes with PyTorch.
ENV XDG_CACHE_HOME=/cache

USER deit
WORKDIR /
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as web; web.urlopen('http://127.0.0.1:8000/readyz', timeout=5)"]
# In this form (no shell), the server itself gets SIGTERM, and ends after it has answered its requests.
ENTRYPOINT ["deit", "serve", "/model", "--host", "0.0.0.0", "--port", "8000"]
