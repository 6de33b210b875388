# What launch/torchrun.sh and launch/multinode.sh share; to be sourced, with $here set.

if [[ -z ${PYTHON-} ]]; then
    PYTHON=python3
    [[ ! -x $here/.venv/bin/python ]] || PYTHON=$here/.venv/bin/python
fi

fail() { # each argument a line, to stderr
    printf '%s\n' "${0##*/}: $1" "${@:2}" >&2
    exit 2
}

require_script() { # its arguments: those of this starter
    (($#)) || fail "which script? For example: ${0##*/} examples/char_lm.py --steps 100"
    # torchrun's own options may stand before it.
    [[ $1 == -* || -f $1 ]] || fail "$1: there is no such script (from $PWD)"
}

require_count() { # name value [least]
    [[ $2 =~ ^[0-9]+$ ]] && (($2 >= ${3-1})) || fail "$1='$2': expected a whole number, ${3-1} or more"
}

count_gpus() { # 1 where there is none: one rank, on the CPU
    "$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))' ||
        fail "$PYTHON has no torch: name one that has, PYTHON=…, or run launch/setup.sh"
}

restart_safely() { # before torchrun
    # The ranks of a second life would share a store with those of the first, whose addresses they may read
    # there, and wait for them in vain (gloo: "connectFullMesh failed"; seen with torch 2.13). So: a new one.
    ((MAX_RESTARTS == 0)) || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE-1}
}
