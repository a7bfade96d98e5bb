#!/usr/bin/env bash
# Installs what building and testing need, on Debian and its kin; asks for nothing if it is all there.
# Usage: setup.sh VENV
set -euo pipefail
venv=$1

if ! command -v cargo >/dev/null; then
    echo 'setup: no Rust toolchain. Install one with rustup (https://rustup.rs), then run this again.' >&2
    exit 1
fi

# program → package that brings it
declare -A packages=(
    [cc]=build-essential [make]=build-essential [fusermount3]=fuse3 [getfattr]=attr [getfacl]=acl
    [mkfs.ext4]=e2fsprogs [setcap]=libcap2-bin [python3]=python3 [setpriv]=util-linux [mount]=mount
    [softhsm2-util]=softhsm2 [pkcs11-tool]=opensc
)
PATH=$PATH:/sbin:/usr/sbin
missing=()
for program in "${!packages[@]}"; do
    command -v "$program" >/dev/null || missing+=("${packages[$program]}")
done
python3 -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3 python3-venv)

if [ ${#missing[@]} -gt 0 ]; then
    if ! command -v apt-get >/dev/null; then
        echo "setup: install these by hand, this is not Debian: ${missing[*]}" >&2
        exit 1
    fi
    sudo=()
    [ "$(id -u)" = 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get update -q
    DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -q -y --no-install-recommends "${missing[@]}"
fi

[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/python" -m pip install -q --disable-pip-version-check \
    -r "$(dirname "$0")/../tests/reader/requirements.txt" -r "$(dirname "$0")/../tests/support/requirements.txt"
"$venv/bin/python" - <<'PY'
# The reader needs AES-GCM-SIV, which OpenSSL has since 3.2; the wheels of `cryptography` bring their own.
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV
AESGCMSIV(bytes(32)).encrypt(bytes(12), b"", b"")
PY
echo "setup: done"
