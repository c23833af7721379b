#!/bin/sh
# CI in a minimal Debian 12 in FOLDER, where nothing is there by luck: Python, git and what .ci/run installs. For root.
# Packages come from where this machine has them from.
set -eu
root=${1:?"give a folder for the Debian, such as /var/tmp/empty"}
checkout=$(cd "$(dirname "$0")/.." && pwd)
mirror=$(grep -hoE 'https?://[^ ]+/debian/?( |$)' -r /etc/apt/sources.list /etc/apt/sources.list.d 2>/dev/null | head -n 1 | tr -d ' ')

if [ ! -x "$root/usr/bin/git" ]; then
    debootstrap --variant=minbase --include=ca-certificates,git,python3 bookworm "$root" "${mirror:-http://deb.debian.org/debian}"
fi
rm -f "$root/etc/apt/sources.list"
cp -a /etc/apt/sources.list* /etc/apt/apt.conf.d "$root/etc/apt/"
for file in /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/xdg/pip; do
    [ ! -e "$file" ] || { mkdir -p "$root$(dirname "$file")" && cp -rL --remove-destination "$file" "$root$(dirname "$file")/"; }
done
cp -L --remove-destination /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"

# A namespace of its own for what is mounted: nothing of it is left, however this ends.
export root checkout
exec unshare --mount --pid --fork --kill-child sh -eu -c '
    mount -t proc proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount --rbind /dev "$root/dev"
    wheels=${PIP_FIND_LINKS:-}
    if [ -d "$wheels" ]; then mkdir -p "$root$wheels" && mount --bind "$wheels" "$root$wheels"; fi
    rm -rf "$root/ci"
    git clone --quiet "$checkout" "$root/ci"
    exec chroot "$root" env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 CI=true \
        $(env | grep "^PIP_" | tr "\n" " ") sh -c "cd /ci && exec bash .ci/run"
'
