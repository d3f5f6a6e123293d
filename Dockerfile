# The pinned container: the compiler, its embed tools and the cross compiler for boards; docs/container.md tells more.
# `make image` builds it, and then writes it again without the times that any builder puts in.
# By hand, on a Debian 12 image of your choice:
#   docker build --network host --build-arg BASE_IMAGE=debian:bookworm-slim@sha256:... --tag axc .

ARG BASE_IMAGE=axc-base

# Debian packages at the recorded versions. A base of `make base-image` has them: nothing to fetch.
FROM ${BASE_IMAGE} AS debian
LABEL axc.stage=
ARG SOURCE_DATE_EPOCH=0
COPY ci/container/packages.txt ci/container/packages.sh /packages/
RUN ["sh", "/packages/packages.sh", "/packages/packages.txt"]

# Python packages by hash. The wheels and certificates of ci/container/extra are seen here, and left here.
FROM debian AS python
ARG SOURCE_DATE_EPOCH=0
ARG PIP_NO_INDEX=
ENV SSL_CERT_FILE=/etc/ssl/certs/axc.pem
COPY ci/container/extra /extra
RUN cat /etc/ssl/certs/ca-certificates.crt /extra/certificates/*.crt >$SSL_CERT_FILE 2>/dev/null || true
COPY requirements /axc/requirements
COPY pyproject.toml LICENSE /axc/
COPY board/pyproject.toml board/hatch_build.py /axc/board/
COPY board/axrun/__init__.py /axc/board/axrun/
COPY toolchain/axc/__init__.py /axc/toolchain/axc/
COPY ci/container/settle.sh /extra/
RUN WHEELS=/extra/wheels PIP_CERT=$SSL_CERT_FILE PYTHONPATH=/axc python3 -c "from pathlib import Path; \
    from requirements.install import install; install(Path('/opt/axc'), 'build', 'reference')" \
    && sh /extra/settle.sh
COPY . /axc
# libax_engine, by the compiler that came with the locks.
RUN /opt/axc/bin/python /axc/board/engine/build.py && rm -rf /axc/board/engine/build /axc/ci/container/extra

FROM debian
COPY --from=python /opt/axc /opt/axc
COPY --from=python /axc /axc
ENV PATH=/opt/axc/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/tmp USER=axc PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
WORKDIR /work
# Nobody in particular: whoever runs it maps their own, docker run --user $(id -u):$(id -g)
USER 1000:1000
CMD ["axc", "--help"]
