#!/bin/sh
# A certificate authority of one's own and a certificate for the gateway, in ./tls. For trying out: a real edge has a real certificate.
set -eu
cd "$(dirname "$0")"
umask 077
mkdir -p tls
curve="-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
# shellcheck disable=SC2086 # $curve is several words
openssl req -x509 $curve -days 30 -subj '/CN=Keyward example CA' -addext 'basicConstraints=critical,CA:TRUE' \
    -addext 'keyUsage=critical,keyCertSign' -keyout tls/ca-key.pem -out tls/ca.pem 2>/dev/null
openssl req $curve -subj '/CN=llm.example' -keyout tls/key.pem -out tls/request.pem 2>/dev/null
cat > tls/extensions <<'END'
subjectAltName=DNS:llm.example,DNS:localhost,IP:127.0.0.1
basicConstraints=CA:FALSE
extendedKeyUsage=serverAuth
authorityKeyIdentifier=keyid
END
openssl x509 -req -in tls/request.pem -CA tls/ca.pem -CAkey tls/ca-key.pem -CAcreateserial -days 30 -extfile tls/extensions \
    -out tls/certificate.pem 2>/dev/null
# Nobody needs to sign with it again.
rm -f tls/ca-key.pem tls/request.pem tls/extensions
echo "tls/ca.pem signs tls/certificate.pem for llm.example and localhost"
