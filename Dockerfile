# Images for the nodes of kuberay.yaml: Ray's own, with the pinned dependencies and this repository. RAY is the version in
# constraints.txt. An edit of the source ships only the last layer. CPU_WHEELS is the page, or a folder, of PyTorch's CPU wheels
# (pytorch.org, Get Started; then /torch); without it nodes without a GPU get the CUDA wheels too.
#
#   docker build --target cpu --build-arg CPU_WHEELS=<page> -t <registry>/addressvlm:0.1.0-cpu . && docker push <registry>/addressvlm:0.1.0-cpu
#   docker build --target gpu -t <registry>/addressvlm:0.1.0-gpu . && docker push <registry>/addressvlm:0.1.0-gpu
ARG RAY=2.60.0

FROM python:3.11-slim AS requirements
COPY pyproject.toml .
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > /requirements.txt

FROM rayproject/ray:${RAY}-py311-cpu AS cpu
WORKDIR /home/ray/addressvlm
COPY --chown=ray:users constraints.txt .
ARG CPU_WHEELS=
RUN pip install --no-cache-dir -c constraints.txt torch ${CPU_WHEELS:+--find-links "$CPU_WHEELS"}
COPY --from=requirements /requirements.txt /tmp/
RUN pip install --no-cache-dir -c constraints.txt -r /tmp/requirements.txt
COPY --chown=ray:users . .
RUN pip install --no-cache-dir --no-deps .
# Jobs and `serve run serve.config` are started from here.
ENV RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 RAY_USAGE_STATS_ENABLED=0

FROM rayproject/ray:${RAY}-py311-gpu AS gpu
WORKDIR /home/ray/addressvlm
COPY --chown=ray:users constraints.txt .
RUN pip install --no-cache-dir -c constraints.txt torch
COPY --from=requirements /requirements.txt /tmp/
RUN pip install --no-cache-dir -c constraints.txt -r /tmp/requirements.txt
COPY --chown=ray:users . .
RUN pip install --no-cache-dir --no-deps .
ENV RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 RAY_USAGE_STATS_ENABLED=0
