# Installs the Debian packages listed in $1 (name version architecture sha256) in exactly those versions.
set -eu

grep -v -e '^#' -e '^SOURCE_DATE_EPOCH' "$1" | while read -r name version _; do
  [ "$(dpkg-query --show --showformat='${Version}' "$name" 2>/dev/null)" = "$version" ] || echo "$name=$version"
done >/packages/missing

if [ -s /packages/missing ]; then
  apt-get -qq update
  DEBIAN_FRONTEND=noninteractive xargs -a /packages/missing apt-get -qq install -y --no-install-recommends \
    --allow-downgrades --allow-change-held-packages
  rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/ldconfig/* /var/log/*
fi
rm -rf /packages
