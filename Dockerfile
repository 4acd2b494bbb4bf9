# The server in a container; torch's wheel from the package index brings its own CUDA libraries.
#   docker build -t quickchange . && docker run --gpus all -p 50051:50051 -p 9464:9464 -v quickchange:/data quickchange
FROM python:3.11-slim AS build
# For the native kernels; the compiler stays behind in this stage.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt ./
RUN python -m venv /opt/quickchange \
 && /opt/quickchange/bin/pip install --no-cache-dir --constraint constraints.txt torch==2.13.0
COPY pyproject.toml setup.py README.md LICENSE ./
COPY quickchange quickchange
COPY server server
COPY adapters adapters
COPY training training
COPY kernels kernels
RUN /opt/quickchange/bin/pip install --no-cache-dir --constraint constraints.txt '.[server]'

FROM python:3.11-slim
RUN useradd --create-home --uid 10001 quickchange && install -d -o quickchange /data
COPY --from=build /opt/quickchange /opt/quickchange
ENV PATH=/opt/quickchange/bin:$PATH QUICKCHANGE_CACHE=/data/cache
USER quickchange
VOLUME /data
EXPOSE 50051 9464
ENTRYPOINT ["quickchange", "serve", "--store", "/data/store", "--host", "0.0.0.0", "--metrics-host", "0.0.0.0"]
CMD ["--base", "smollm2"]
