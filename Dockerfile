FROM python:3.13-slim-trixie AS build

# No cache: nothing would read it again.
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build

# The final stage takes /opt/gateway-queue as it is, so pip stays out of it.
RUN python -m venv /opt/build && python -m venv --without-pip /opt/gateway-queue

# Dependencies first: this layer lasts until one of them changes.
COPY requirements.txt .
COPY scripts/requirements.txt scripts/
RUN /opt/build/bin/pip install --require-hashes -r scripts/requirements.txt \
 && /opt/build/bin/pip --python /opt/gateway-queue install --require-hashes -r requirements.txt

COPY . .
RUN /opt/build/bin/python -m hatchling build --target wheel --directory dist \
 && /opt/build/bin/pip --python /opt/gateway-queue install --no-deps --no-index dist/*.whl


FROM python:3.13-slim-trixie

LABEL org.opencontainers.image.title="gateway-queue" \
      org.opencontainers.image.description="An HTTP queue that lets the shards of a Discord bot identify one after the other, one per window." \
      org.opencontainers.image.licenses="ISC"

COPY --from=build /opt/gateway-queue /opt/gateway-queue

ENV PATH=/opt/gateway-queue/bin:$PATH HOST=0.0.0.0 PORT=5000
EXPOSE 5000

# pip has compiled the packages, but this base image has its standard library as source alone, and
# the user below could not keep what a start compiles. So the modules of a start are imported once as
# root.
RUN gateway-queue --help >/dev/null && python -c "import gateway_queue.server"

# A number, not a name: Kubernetes' runAsNonRoot can check no other.
USER 10001:10001

# A start of Python with all modules takes a third of a second of CPU time, so not more often.
HEALTHCHECK --interval=30s --timeout=10s --start-period=10s CMD ["gateway-queue", "status"]

ENTRYPOINT ["gateway-queue"]
