# The agent's image. Builds with the classic builder as well as with BuildKit.
#
#   docker build -t backupd .
#   docker run --read-only --tmpfs /tmp -v data:/backup/data:ro -v backups:/backups backupd
#
# Without a configuration it backs up each directory under /backup into /backups, by BACKUP_SCHEDULE and
# RETENTION_DAYS; one at /etc/backupd/backupd.toml is read where it is mounted.

FROM python:3.11-slim AS clients
COPY deploy/image/ /image/
RUN /image/postgres-clients.sh /image/postgres-clients.txt /usr/lib/postgresql

FROM python:3.11-slim AS package
WORKDIR /src
RUN python -m venv /opt/backupd
ENV PATH=/opt/backupd/bin:$PATH
# what it leans on, in a layer that a change of the package leaves alone
COPY pyproject.toml ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb')); print(*p['build-system']['requires'], *p['project']['dependencies'], sep='\n')" > requirements.txt \
 && pip install -q --no-cache-dir -r requirements.txt
COPY pyproject.toml README.md* ./
COPY backupd ./backupd
RUN pip install -q --no-cache-dir --no-deps --no-build-isolation . \
 && pip uninstall -q -y setuptools pip

FROM python:3.11-slim
# tini reaps what pg_dump and docker exec leave behind, and passes SIGTERM on; the rest is what psql is linked to
RUN apt-get update -qq \
 && apt-get install -qq -y --no-install-recommends tini libgssapi-krb5-2 liblz4-1 libreadline8 libzstd1 \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/apt /var/log/dpkg.log \
 && groupadd -g 10001 backupd && useradd -u 10001 -g backupd -d /var/lib/backupd -s /usr/sbin/nologin backupd \
 && install -d -o backupd -g backupd -m 700 /var/lib/backupd && install -d -o backupd -g backupd /backups \
 && install -d /backup /etc/backupd
COPY --from=clients /usr/lib/postgresql /usr/lib/postgresql
COPY --from=package /opt/backupd /opt/backupd
ENV PATH=/opt/backupd/bin:/usr/lib/postgresql/18/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/var/lib/backupd XDG_STATE_HOME=/var/lib/backupd XDG_CACHE_HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /var/lib/backupd
USER backupd
VOLUME ["/var/lib/backupd", "/backups"]
EXPOSE 8722
# HEALTH_PORT: where `serve.listen` names another port
HEALTHCHECK --interval=30s --timeout=10s --start-period=15s --retries=3 CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('HEALTH_PORT', '8722')), timeout=8); c.request('GET', '/healthz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["/usr/bin/tini", "--", "backupd"]
CMD ["serve"]
