FROM python:3.13-slim-trixie AS build

# No cache of pip, because nothing would read it again.
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build

# The final stage copies the whole of /opt/gateway-queue, so pip is not installed there.
RUN python -m venv /opt/build && python -m venv --without-pip /opt/gateway-queue

# Dependencies first: Docker reuses this layer until one of them changes.
COPY requirements.txt .
COPY scripts/requirements.txt scripts/
RUN /opt/build/bin/pip install --require-hashes -r scripts/requirements.txt \
 && /opt/build/bin/pip --python /opt/gateway-queue install --require-hashes -r requirements.txt

COPY . .
RUN /opt/build/bin/python -m hatchling build --target wheel --directory dist \
 && /opt/build/bin/pip --python /opt/gateway-queue install --no-deps --no-index dist/*.whl


FROM python:3.13-slim-trixie

LABEL org.opencontainers.image.title="gateway-queue" \
      org.opencontainers.image.description="An HTTP queue that lets the shards of a Discord bot identify one after the other, one per window and rate limit key." \
      org.opencontainers.image.licenses="ISC"

COPY --from=build /opt/gateway-queue /opt/gateway-queue

ENV PATH=/opt/gateway-queue/bin:$PATH HOST=0.0.0.0 PORT=5000
EXPOSE 5000

# pip has compiled the packages, but this base image has the standard library as source code only,
# and the user below cannot write compiled files. So import all modules of a start once, as root.
RUN gateway-queue --help >/dev/null && python -c "import gateway_queue.server"

# A number, not a name: Kubernetes' runAsNonRoot cannot check a name.
USER 10001:10001

# Each check starts Python, which takes a third of a second of CPU time, so it runs only every 30 s.
HEALTHCHECK --interval=30s --timeout=10s --start-period=10s CMD ["gateway-queue", "status"]

ENTRYPOINT ["gateway-queue"]
