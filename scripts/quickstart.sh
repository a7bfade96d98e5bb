#!/usr/bin/env bash
# A store from beginning to end in a temporary folder. Usage: quickstart.sh ENVELOPEFS
set -euo pipefail
envelopefs=$(realpath "$1")
folder=$(mktemp -d "${TMPDIR:-/tmp}/envelopefs-quickstart.XXXXXX")
backing=$folder/backing mnt=$folder/mnt key=$folder/root.key

cleanup() {
    status=$?
    mountpoint -q "$mnt" && "$envelopefs" unmount "$mnt"
    rm -rf "$folder"
    exit $status
}
trap cleanup EXIT

say() { printf '\n\033[1m# %s\033[0m\n' "$*"; }
# Shows a command as it would be typed, then runs it.
run() {
    local shown="$*"
    shown=${shown//"$envelopefs"/envelopefs}
    printf '$ %s\n' "${shown//"$folder"/.}"
    "$@"
}

mkdir "$backing" "$mnt"
say 'Make a store in an empty folder, with a root key in a file, and mount it'
run "$envelopefs" init "$backing" --key "keyfile:$key"
run "$envelopefs" mount "$backing" "$mnt"

say 'Write and read as anywhere else'
mkdir "$mnt/letters"
echo 'Dear reader, nobody below sees this.' >"$mnt/letters/first.txt"
cp "$envelopefs" "$mnt/program"
ln -s letters/first.txt "$mnt/newest"
run ls -lR "$mnt"
run cat "$mnt/newest"

say 'What the backing folder holds: ciphertext under encrypted names'
sync -f "$mnt"
(cd "$backing" && find . -path ./.envelopefs -prune -o -print | sort)
if grep -rqF 'Dear reader' "$backing"; then
    echo 'quickstart: plaintext found in the backing folder' >&2
    exit 1
fi
echo '(grep finds no "Dear reader" in there)'

say 'Give every file a new key encryption key, on the live mount'
run "$envelopefs" rotate "$mnt" --destroy-old
run "$envelopefs" key list "$mnt"
run cmp "$envelopefs" "$mnt/program"

say 'Unmount; mount again; all there'
run "$envelopefs" unmount "$mnt"
run "$envelopefs" mount "$backing" "$mnt"
run cat "$mnt/letters/first.txt"
run cmp "$envelopefs" "$mnt/program"
run "$envelopefs" unmount "$mnt"

say 'Verify every block, offline'
run "$envelopefs" check "$backing" --deep
printf '\nquickstart: done; the temporary folder is removed\n'
