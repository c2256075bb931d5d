# The job as an image: one command, `python /app/entrypoint.py`, configured by CROWDLAYER_* variables.
#
#   docker build -t crowdlayer .                                      with torch's own CUDA libraries, 64-bit x86 or ARM
#   docker build --build-arg TORCH_INDEX=URL -t crowdlayer:cpu .      torch from another index: CPU only, another CUDA
#
# The layers, from what changes least to what changes most: torch and CUDA, the other libraries, the code.

ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim-bookworm AS venv
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# No pip of its own: the base image's installs into it while building, and nothing needs one later.
RUN python -m venv --without-pip /opt/venv


FROM venv AS torch
ARG TORCH_INDEX=
COPY .docker/requirements-torch.txt /tmp/
# From TORCH_INDEX come the pinned versions of torch and torchvision, whose hashes are not ours, and the GPU libraries
# that this torch asks for: none when it is for CPUs. Nothing links here, so static libraries go. What compileall cannot
# compile is code of other Pythons' that a package carries along.
RUN --mount=type=cache,target=/root/.cache/pip \
    set -eu; \
    if [ -z "${TORCH_INDEX}" ]; then \
        pip --python /opt/venv install --no-compile --no-deps --only-binary :all: \
            --require-hashes -r /tmp/requirements-torch.txt; \
    else \
        sed -nE 's/^((torch|torchvision)==[^ ]+).*/\1/p' /tmp/requirements-torch.txt >/tmp/torch.txt; \
        pip --python /opt/venv install --no-compile --no-deps --only-binary :all: \
            --index-url "${TORCH_INDEX}" -r /tmp/torch.txt; \
        sed -nE 's/^Requires-Dist: ((nvidia|cuda|triton|pytorch-triton|rocm).*)/\1/p' \
            /opt/venv/lib/python*/site-packages/torch-*.dist-info/METADATA >/tmp/gpu.txt; \
        if [ -s /tmp/gpu.txt ]; then \
            pip --python /opt/venv install --no-compile --only-binary :all: \
                --index-url "${TORCH_INDEX}" -r /tmp/gpu.txt; \
        fi; \
    fi; \
    find /opt/venv -name '*.a' -delete; \
    python -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/venv/lib || :


FROM venv AS libraries
COPY .docker/requirements.txt /tmp/
RUN --mount=type=cache,target=/root/.cache/pip \
    set -eu; \
    pip --python /opt/venv install --no-compile --no-deps --only-binary :all: --require-hashes -r /tmp/requirements.txt; \
    find /opt/venv/lib -type d -name tests -prune -exec rm -rf {} +; \
    python -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/venv/lib || :


# What is in the image, as CycloneDX: read from what is installed, not from what was asked for.
FROM venv AS sbom
COPY .docker/requirements-sbom.txt /tmp/
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/sbom \
 && pip --python /opt/sbom install --no-deps --only-binary :all: --require-hashes -r /tmp/requirements-sbom.txt
RUN --mount=type=bind,from=torch,source=/opt/venv/lib,target=/opt/venv/lib \
    --mount=type=bind,from=libraries,source=/opt/venv/lib,target=/mnt/lib \
    PYTHONPATH="$(echo /mnt/lib/python*/site-packages)" /opt/sbom/bin/cyclonedx-py environment --output-reproducible \
        --output-file /sbom.cdx.json /opt/venv/bin/python


FROM venv AS code
COPY LICENSE entrypoint.py /app/
COPY crowdlayer /app/crowdlayer
# Readable by any user, whatever the modes of the checkout are.
RUN chmod -R u=rwX,go=rX /app \
 && python -m compileall -q --invalidation-mode unchecked-hash /app


FROM python:${PYTHON_VERSION}-slim-bookworm
# Any user id, no passwd entry, no home, a root file system that is read only: what must be written goes to /tmp.
# USER is for getpass, which asks passwd without it. No CROWDLAYER_* variable here: the job takes each for a setting.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    USER=crowdlayer \
    XDG_CACHE_HOME=/tmp/.cache \
    TORCH_HOME=/tmp/torch \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    HF_HUB_OFFLINE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

COPY --from=torch /opt/venv /opt/venv
COPY --from=libraries /opt/venv /opt/venv
# The two halves make a whole, and it loads. Nobody can become another by a program of the base image.
RUN --mount=type=tmpfs,target=/tmp \
    pip --python /opt/venv --disable-pip-version-check check \
 && python -c "import accelerate, boto3, filelock, jinja2, msgspec, obstore, pydantic_settings, pythonjsonlogger, tenacity, torch, torchvision, yaml" \
 && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
WORKDIR /app
COPY --from=sbom /sbom.cdx.json /app/
COPY --from=code /app /app

USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "/app/entrypoint.py"]

# Last, so that a new version changes these lines only.
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="crowdlayer" \
      org.opencontainers.image.description="Trains an image classifier from the answers of many fallible workers" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
