#!/bin/bash
# Checks that all C++ and CUDA sources are formatted; with --fix, formats them.
# Exits 1 where some are not, 77 ("skipped") where there is no clang-format.
set -euo pipefail
cd "$(dirname "$0")/.."

# The version that tools/setup.sh installs comes first: other versions format some constructs in other ways.
clang_format=$(ls .deps/venv/lib/python3*/site-packages/clang_format/data/bin/clang-format 2>/dev/null ||
  command -v clang-format || true)
if [ -z "$clang_format" ]; then
  echo "format: skipped, clang-format was not found (tools/setup.sh test installs it)"
  exit 77
fi

folders=()
for folder in kernels calibration qat smoothquant export recipes cli tests bench examples tools; do
  if [ -d $folder ]; then folders+=($folder); fi
done
mapfile -t files < <(find "${folders[@]}" -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' | sort)
[ ${#files[@]} -gt 0 ] || exit 0
if [ "${1:-}" = --fix ]; then
  "$clang_format" -i "${files[@]}"
elif ! "$clang_format" --dry-run -Werror "${files[@]}"; then
  echo "format: run 'make format'" >&2
  exit 1
fi
