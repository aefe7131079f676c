# All images of Midstream. Targets: operator, agent, runtime (the gateway), builtin (runtime with the built-in engine).
#
#   docker build --target operator -t midstream-operator .
#
# Python packages are pinned by hash (requirements/), Debian's by the base's release. The tests build from a Debian 12
# made by debootstrap (scripts/images.sh): BASE. The PIP_ arguments are pip's own settings, for a mirror or a folder.
ARG BASE=debian:12.12-slim

FROM ${BASE} AS python
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 ca-certificates \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*
ENV PATH=/opt/midstream/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

FROM python AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-venv gcc libc6-dev make \
 && rm -rf /var/lib/apt/lists/*
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY requirements/ /src/requirements/

FROM build AS operator-packages
ARG PIP_INDEX_URL PIP_NO_INDEX PIP_FIND_LINKS
RUN python3 -m venv /opt/midstream \
 && pip install -q --no-compile --require-hashes -r /src/requirements/operator.txt \
 && pip uninstall -q -y pip setuptools

FROM build AS run-packages
ARG PIP_INDEX_URL PIP_NO_INDEX PIP_FIND_LINKS
RUN python3 -m venv /opt/midstream \
 && pip install -q --no-compile --require-hashes -r /src/requirements/run.txt \
 && pip uninstall -q -y pip setuptools

FROM build AS library
COPY csrc/ /src/csrc/
COPY bpf/ /src/bpf/
RUN make -s -C /src/csrc

# The loader needs the UAPI headers of any kernel; Debian's packages would bring a compiler with them.
FROM build AS headers
RUN apt-get update \
 && cd /tmp \
 && flavour=$(apt-cache depends linux-headers-$(dpkg --print-architecture) | awk '/Depends: linux-headers/ {print $2}') \
 && common=$(apt-cache depends $flavour | awk '/Depends: linux-headers-.*-common/ {print $2}') \
 && apt-get download $flavour $common \
 && for package in linux-headers-*.deb; do dpkg-deb -x $package /headers; done \
 && cd /headers/usr/src \
 && find . -mindepth 2 -maxdepth 2 ! -name include ! -name arch -exec rm -rf {} + \
 && find . -mindepth 4 -maxdepth 4 -path '*/arch/*' ! -name include -exec rm -rf {} +

FROM python AS operator
COPY --from=operator-packages /opt/midstream /opt/midstream
COPY agent/midstream_agent/__init__.py /opt/midstream/lib/python3.11/site-packages/midstream_agent/
COPY agent/midstream_agent/contract /opt/midstream/lib/python3.11/site-packages/midstream_agent/contract
COPY operator/ /opt/midstream/lib/python3.11/site-packages/
COPY crds/ /opt/midstream/crds/
USER 65532:65532
ENTRYPOINT ["python", "-m", "midstream_operator.main"]
CMD ["--config", "/etc/midstream/operator.yaml"]

# Root: it enters the pods' namespaces. The chart lists the capabilities that it keeps, with the reason for each.
FROM python AS agent
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-bpfcc \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*
COPY --from=headers /headers/usr/src /usr/src
COPY --from=run-packages /opt/midstream /opt/midstream
COPY --from=library /src/build/csrc/libmidstream_tcp.so.1 /usr/lib/midstream/
COPY agent/ runtime/ /opt/midstream/lib/python3.11/site-packages/
COPY bpf/ /opt/midstream/lib/python3.11/site-packages/midstream_agent/_bpf/
ENTRYPOINT ["python", "-m", "midstream_agent"]

# The gateway; its engine runs in a container of its own.
FROM python AS runtime
COPY --from=run-packages /opt/midstream /opt/midstream
COPY runtime/ /opt/midstream/lib/python3.11/site-packages/
RUN mkdir -p -m 1777 /run/midstream
USER 65532:65532
ENTRYPOINT ["python", "-m", "midstream_runtime.serve"]

# The same with the built-in engine: Debian's torch, a small model. For trying it out, not for serving.
FROM runtime AS builtin
USER 0:0
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-torch \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*
USER 65532:65532
CMD ["--engine-python", "/usr/bin/python3"]
