# One image for the driver, the head and the workers, with Ray's cluster launcher and with KubeRay.
#
#   docker build --tag <registry>/diffusionclip-ray:0.1.0 .
#
# CUDA comes with torch's wheels; the machine brings the driver (580 or newer for CUDA 13) and NVIDIA's container toolkit.
FROM python:3.12.8-slim-bookworm AS base
ENV PATH=/opt/venv/bin:$PATH

# Gigabytes, and the same until a pinned version changes.
FROM base AS packages
WORKDIR /build
COPY constraints.txt pyproject.toml ./
RUN python -m venv /opt/venv \
 && pip install --no-cache-dir --constraint constraints.txt uv \
 && uv pip install --no-cache --python /opt/venv --constraint constraints.txt --requirement pyproject.toml boto3

# A few megabytes that change with every commit.
FROM packages AS wheel
COPY README.md LICENSE NOTICE ./
COPY models models
COPY pipeline pipeline
COPY jobs jobs
RUN uv build --wheel --build-constraint constraints.txt --out-dir /wheel

FROM base
# The launcher's head reaches its workers by ssh and rsync; wget is what older KubeRay probes with.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends openssh-client rsync wget \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --create-home --shell /bin/bash ray \
 && install --directory --owner=ray --mode=700 /home/ray/.ray /home/ray/.ssh \
 && install --directory --owner=ray /scratch
COPY --from=packages /opt/venv /opt/venv
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel pip install --no-cache-dir --no-deps --no-index /wheel/*.whl
# The launcher looks for HOME here; figures of how Ray is used stay at home.
ENV HOME=/home/ray \
    LANG=C.UTF-8 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
USER 1000
WORKDIR /home/ray
CMD ["diffusionclip", "--help"]
