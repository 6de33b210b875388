#!/usr/bin/env bash
# Install the Debian packages that tests need (Chromium, iproute2, Slurm), where they are missing and this is root
# on Debian or a derivative of it; elsewhere say what is missing.
set -euo pipefail

# What tests look at the report page with, make two hosts of one machine with, and submit a job to.
declare -A debian=([chromium]=chromium [chromedriver]=chromium-driver [fc-match]=fontconfig [ip]=iproute2
    [slurmctld]=slurm-wlm [munged]=munge)
missing=()
for command in "${!debian[@]}"; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$command" >/dev/null || missing+=("${debian[$command]}")
done
if ((${#missing[@]})); then
    if [[ $EUID == 0 ]] && command -v apt-get >/dev/null; then
        echo "installing ${missing[*]}" >&2
        export DEBIAN_FRONTEND=noninteractive
        { apt-get update -qq && apt-get install -qq -y --no-install-recommends "${missing[@]}" fonts-dejavu-core; } \
            >/dev/null || echo "not installed: the tests that need them will fail" >&2
    else
        echo "missing: ${missing[*]}; the tests that need them will fail" >&2
    fi
fi
