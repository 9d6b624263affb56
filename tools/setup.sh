#!/bin/bash
# Installs what building, testing and the demo need, on Debian 12, Ubuntu 24.04 and later. Nothing is done twice.
#
#   tools/setup.sh MODE...     build   compiler, libraries, LibTorch; with nvcc also CUDA's libraries and the CUTLASS headers
#                              test    build, and GoogleTest, clang-format, Python packages
#                              bench   build, and Google Benchmark
#                              demo    build, and Python packages and the demo's model
#
# System packages come from apt, all else from PyPI into .deps/venv, with versions and hashes as in tools/requirements.
# A LibTorch of your own in CMAKE_PREFIX_PATH or VERNIER_TORCH_ROOT is used as it is; VERNIER_CUDA=OFF leaves out CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 2; }

system=() requirements=() wanted=" "
for mode in "$@"; do
  case $mode in
    build | test | bench | demo) wanted+="build $mode " ;;
    *) die "unknown mode '$mode'; known: build test bench demo" ;;
  esac
done
[ $# -gt 0 ] || die "usage: tools/setup.sh build|test|bench|demo ..."
wants() { [[ $wanted == *" $1 "* ]]; }

# ---- What is here already ----------------------------------------------------------------------------------------------------
# Is there a LibTorch of the user's own? The same places as in tools/cmake/VernierTorch.cmake.
own_torch() {
  local dir root
  local -a dirs
  IFS=':;' read -ra dirs <<<"${VERNIER_TORCH_ROOT:-}:${CMAKE_PREFIX_PATH:-}"
  for dir in "${dirs[@]}"; do
    [ -n "$dir" ] || continue
    for root in "$dir" "$dir/torch" "$dir/../.." "$dir"/lib/python3*/site-packages/torch; do
      if [ -e "$root/lib/libtorch_cpu.so" ]; then return 0; fi
    done
  done
  return 1
}

nvcc_path() {
  [ "${VERNIER_CUDA:-AUTO}" != OFF ] || return 0
  local nvcc
  for nvcc in "${CUDACXX:-}" "$(command -v nvcc || true)" "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" /usr/local/cuda/bin/nvcc; do
    if [ -n "$nvcc" ] && [ -x "$nvcc" ]; then echo "$nvcc"; return 0; fi
  done
}

# True where the system's CMake knows CUDA 13.
new_cmake() {
  local version
  version=$(cmake --version 2>/dev/null | sed -n '1s/[^0-9]*//p') || return 1
  [ -n "$version" ] && [ "$(printf '%s\n' 3.28 "$version" | sort -V | head -n 1)" = 3.28 ]
}

# ---- System packages -----------------------------------------------------------------------------------------------------------
system+=(python3 python3-venv g++ make ninja-build libhdf5-dev libcli11-dev libeigen3-dev libyaml-cpp-dev nlohmann-json3-dev)
if wants test; then system+=(libgtest-dev); fi
if wants bench; then system+=(libbenchmark-dev); fi

install_system_packages() {
  if ! command -v dpkg-query >/dev/null; then
    say "this is neither Debian nor Ubuntu: what the packages ${system[*]} hold has to be here already"
    return 0
  fi
  local -a missing
  mapfile -t missing < <(comm -23 <(printf '%s\n' "${system[@]}" | sort) \
    <(dpkg-query -W -f='${db:Status-Status} ${Package}\n' "${system[@]}" 2>/dev/null | sed -n 's/^installed //p' | sort))
  [ ${#missing[@]} -gt 0 ] || return 0
  local -a as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo -n)
    sudo -n true 2>/dev/null || die "system packages are missing; install them and run again:
  sudo apt-get install -y --no-install-recommends ${missing[*]}"
  fi
  say "installing system packages: ${missing[*]}"
  mkdir -p .deps
  # An unreachable third-party source fails the update, but not what is needed here.
  "${as_root[@]}" apt-get update -qq >.deps/setup.log 2>&1 || true
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >>.deps/setup.log 2>&1 ||
    die "apt-get could not install ${missing[*]} (network? details: .deps/setup.log); install them by hand or run again"
}

# ---- Python packages -----------------------------------------------------------------------------------------------------------
# Prints the name==version of what a requirements file pins and the environment lacks, and clears away half-installed packages.
missing_packages() {
  .deps/venv/bin/python - "$@" <<'PYTHON'
import importlib.metadata, re, shutil, sys
for path in sys.argv[1:]:
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", open(path).read(), re.M):
        try:
            found = importlib.metadata.distribution(name)
            if found.version == version and found.read_text("RECORD"):
                continue
            if not found.read_text("RECORD"):  # pip writes it last
                shutil.rmtree(found._path)
        except importlib.metadata.PackageNotFoundError:
            pass
        print(f"{name}=={version}")
PYTHON
}

# The first error pip reported, cut to a readable length.
why_pip_failed() {
  local error
  error=$(sed -n 's/^ERROR: //p' .deps/setup.log | head -n 1 | cut -c 1-150)
  echo "${error:-pip was stopped}"
}

install_python_packages() {
  local python=${PYTHON:-/usr/bin/python3} file files=() missing stamp key
  [ -x "$python" ] || python=$(command -v python3) || die "python3 was not found"
  for file in "${requirements[@]}"; do files+=("tools/requirements/$file.txt"); done

  # Nothing to do where the last run in these modes installed the same files into an environment of the same Python.
  stamp=.deps/stamp-$(echo "${requirements[*]}" | tr ' ' '-')
  stamp_key() { cat "${files[@]}" .deps/venv/pyvenv.cfg | sha256sum; }
  if [ -e "$stamp" ] && [ -x .deps/venv/bin/python ] && .deps/venv/bin/python -S -c '' 2>/dev/null; then
    key=$(stamp_key)
    if [ "$key" = "$(cat "$stamp")" ]; then return 0; fi
  fi

  mkdir -p .deps
  exec 9>.deps/lock
  flock 9  # two builds that start at once
  if ! .deps/venv/bin/python -m pip --version >/dev/null 2>&1; then
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' ||
      die "Python 3.11 to 3.14 is needed, and $python is $("$python" -V); name another one in PYTHON"
    say "creating .deps/venv with $("$python" -V)"
    "$python" -m venv --clear .deps/venv >.deps/setup.log 2>&1 || die "python3 -m venv failed (details: .deps/setup.log)"
  fi
  missing=$(missing_packages "${files[@]}" | tr '\n' ' ')
  if [ -n "$missing" ]; then
    say "installing into .deps/venv: ${missing% }"
    local quiet=(-q)
    if [ -t 1 ]; then quiet=(); fi
    .deps/venv/bin/python -m pip install "${quiet[@]}" --disable-pip-version-check --no-input --retries 3 --no-cache-dir \
      --require-hashes --no-deps --only-binary=:all: "${files[@]/#/--requirement=}" 2>.deps/setup.log ||
      die "could not fetch ${missing% }: $(why_pip_failed); with network, or PIP_INDEX_URL or PIP_FIND_LINKS naming where the" \
        "wheels are, run the same command again (details: .deps/setup.log)"
  fi
  stamp_key >"$stamp"
}

# ---- Here it goes --------------------------------------------------------------------------------------------------------------
own=0
if own_torch; then own=1; fi
if [ "$(uname -m)" != x86_64 ] && [ $own = 0 ]; then
  die "LibTorch is set up on x86-64 only; on $(uname -m), put a LibTorch 2.11 of your own into CMAKE_PREFIX_PATH"
fi
install_system_packages

nvcc=$(nvcc_path)
if [ -n "$nvcc" ] && [ $own = 0 ] && ! "$nvcc" --version | grep -q 'release 13\.'; then
  say "$nvcc is not of CUDA 13, as this LibTorch is: CUDA parts will be skipped"
  nvcc=
fi
if [ $own = 0 ]; then requirements+=(libtorch); fi
if [ -n "$nvcc" ]; then
  requirements+=(cutlass)
  if [ $own = 0 ]; then requirements+=(cuda); fi
fi
if ! new_cmake; then requirements+=(cmake); fi
if wants test; then
  requirements+=(format python)
  # Without CUDA's libraries Python cannot import this torch, and the test that does so skips itself.
  if [ -n "$nvcc" ] && [ $own = 0 ]; then requirements+=(torch-python); fi
fi
if wants demo; then
  if ! wants test; then requirements+=(python); fi
  requirements+=(model)
fi
if [ ${#requirements[@]} -gt 0 ]; then install_python_packages; fi
