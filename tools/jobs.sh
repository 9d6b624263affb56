#!/bin/bash
# Prints how many compilations to run at once: one a core, but each may need 2 GB of memory.
set -euo pipefail
memory=$(awk '/^MemAvailable/ {print int($2 / 1024)}' /proc/meminfo)
limit=$(cat /sys/fs/cgroup/memory.max 2>/dev/null || echo max)  # a container's own limit
if [ "$limit" != max ] && [ $((limit / 1048576)) -lt "$memory" ]; then memory=$((limit / 1048576)); fi
jobs=$((memory / 2048))
cores=$(nproc)
if [ "$jobs" -gt "$cores" ]; then jobs=$cores; fi
if [ "$jobs" -lt 1 ]; then jobs=1; fi
echo "$jobs"
