#!/bin/sh
# Install the servers that the tests of remote tiers start: redis-server, where neither it nor valkey-server is.
# Never fails: the tests that need a missing server skip, and this says why it is missing.
set -u

for server in redis-server valkey-server; do
    if command -v "$server" >/dev/null 2>&1; then
        exit 0
    fi
done

give_up() {
    echo "kvkeep: redis-server is not installed, so tests of remote tiers skip: $1" >&2
    exit 0
}

command -v apt-get >/dev/null 2>&1 || give_up "there is no apt-get; install redis or valkey by hand"

if [ "$(id -u)" -eq 0 ]; then
    as_root=""
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
    as_root="sudo -n"
else
    give_up "neither root nor sudo without a password; run: sudo apt-get install redis-server"
fi

# Debian starts a new service at once, on the port of everybody's own server: this forbids it during the
# installation, and the service is switched off after it. A policy that is there already stays.
policy=/usr/sbin/policy-rc.d
made_policy=no
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | $as_root tee "$policy" >/dev/null \
        && $as_root chmod 755 "$policy" && made_policy=yes
fi

log=$(mktemp)
install() {
    $as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -qq -y --no-install-recommends redis-server >"$log" 2>&1 </dev/null
}

# Lists of packages may be missing or old: they are fetched only when the first try fails.
install || { $as_root apt-get update -qq >"$log" 2>&1 && install; }
status=$?

if [ "$made_policy" = yes ]; then
    $as_root rm -f "$policy"
fi
if [ "$status" -eq 0 ] && [ -d /run/systemd/system ]; then
    $as_root systemctl disable --now redis-server >/dev/null 2>&1
fi

reason=$(grep -E '^(E:|W:)' "$log" | tail -n 1)
rm -f "$log"
command -v redis-server >/dev/null 2>&1 || give_up "${reason:-apt-get failed}"
