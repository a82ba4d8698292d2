# The gateway. Build: docker build -t codefend .
# Run: docker run --rm -p 8800:8800 -e CODEFEND_UPSTREAM=http://model:8000 -e CODEFEND_API_KEYS=... codefend
FROM python:3.11-slim AS build
WORKDIR /src
RUN python -m venv /venv
# On Linux the usual PyTorch brings gigabytes of CUDA; name its CPU index here to leave them out:
# --build-arg TORCH_OPTIONS="--index-url ..."
ARG TORCH_OPTIONS=""
COPY constraints.txt ./
RUN /venv/bin/pip install --no-cache-dir -c constraints.txt torch $TORCH_OPTIONS
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY src ./src
RUN /venv/bin/pip install --no-cache-dir -c constraints.txt ".[gateway,redis]"

FROM python:3.11-slim
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin codefend
COPY --from=build /venv /venv
# Two arenas: with more, glibc keeps the memory of every large image once per thread.
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MALLOC_ARENA_MAX=2 CODEFEND_HOST=0.0.0.0
USER codefend
EXPOSE 8800
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["python", "-c", \
  "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('CODEFEND_PORT', '8800') + '/healthz', timeout=2)"]
ENTRYPOINT ["codefend", "serve"]
