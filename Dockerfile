# One image for every node: Ray's own, with the pinned dependencies and this repository. RAY is the version in constraints.txt.
#
#   docker build -t <registry>/addressvlm:0.1.0 . && docker push <registry>/addressvlm:0.1.0
ARG RAY=2.60.0
FROM rayproject/ray:${RAY}-py311-gpu

WORKDIR /home/ray/addressvlm
COPY --chown=ray:users . .
RUN pip install --no-cache-dir -c constraints.txt .

# Jobs and `serve run serve.config` are started from here; without a hub name in the settings nothing asks for the internet.
ENV RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 RAY_USAGE_STATS_ENABLED=0
