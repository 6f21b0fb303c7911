"""A second reading of the vault string, written from docs/vault-string.md: it shares no code with the product, nor a library
for the cipher. PBKDF2 only: Python has no Argon2."""

import base64
import hashlib
import hmac
import json

PREFIX = "kw_vault_v1_"


def open_string(text, password):
    """The document of a vault string under PBKDF2; raises ValueError if anything does not fit."""
    if not text.startswith(PREFIX):
        raise ValueError("another prefix")
    body = text.removeprefix(PREFIX)
    data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
    if data[0] != 2:
        raise ValueError("no PBKDF2")
    iterations, salt_length = int.from_bytes(data[1:5], "big"), data[5]
    salt, nonce = data[6:6 + salt_length], data[6 + salt_length:18 + salt_length]
    header, sealed, tag = data[:18 + salt_length], data[18 + salt_length:-16], data[-16:]
    key = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, iterations, 32)
    document = gcm_open(key, nonce, sealed, tag, PREFIX.encode() + header)
    if len(document) % 256:
        raise ValueError("no padding")
    return json.loads(document)


# --- AES-256-GCM (FIPS 197, NIST SP 800-38D) ----------------------------------------------------------------------------


def times_x(byte):
    return (byte << 1) ^ (0x11B if byte & 0x80 else 0)


def s_box():
    """Inverse in GF(2^8) by walking the powers of 3, then the affine map."""
    box, p, q = [0x63] * 256, 1, 1
    for _ in range(255):
        p ^= times_x(p)
        # Division by 3.
        q ^= q << 1
        q ^= q << 2
        q ^= q << 4
        q &= 0xFF
        q ^= 0x09 if q & 0x80 else 0
        turned = q
        for _ in range(4):
            turned = (turned << 1 | turned >> 7) & 0xFF
            box[p] ^= turned
        box[p] ^= q
    return box


BOX = s_box()


def round_keys(key):
    words, constant = [key[n:n + 4] for n in range(0, 32, 4)], 1
    while len(words) < 60:
        last = words[-1]
        if len(words) % 8 == 0:
            last = bytes(BOX[b] for b in last[1:] + last[:1])
            last, constant = bytes([last[0] ^ constant]) + last[1:], times_x(constant)
        elif len(words) % 8 == 4:
            last = bytes(BOX[b] for b in last)
        words.append(bytes(a ^ b for a, b in zip(words[-8], last)))
    return [b"".join(words[n:n + 4]) for n in range(0, 60, 4)]


def encrypt_block(keys, block):
    state = bytes(a ^ b for a, b in zip(block, keys[0]))
    for number, key in enumerate(keys[1:], 1):
        # Substituted, and row r turned by r columns.
        state = [BOX[state[(n + 4 * (n % 4)) % 16]] for n in range(16)]
        if number < 14:
            mixed = []
            for column in (state[n:n + 4] for n in range(0, 16, 4)):
                every = column[0] ^ column[1] ^ column[2] ^ column[3]
                mixed += [byte ^ every ^ times_x(byte ^ column[(n + 1) % 4]) for n, byte in enumerate(column)]
            state = mixed
        state = bytes(a ^ b for a, b in zip(state, key))
    return state


def ghash(h, data):
    h, y = int.from_bytes(h, "big"), 0
    for n in range(0, len(data), 16):
        x, v, z = y ^ int.from_bytes(data[n:n + 16], "big"), h, 0
        for bit in range(127, -1, -1):
            z ^= v if x >> bit & 1 else 0
            v = (v >> 1) ^ (0xE1 << 120 if v & 1 else 0)
        y = z
    return y.to_bytes(16, "big")


def gcm_open(key, nonce, sealed, tag, associated):
    keys = round_keys(key)
    pad = lambda data: data + bytes(-len(data) % 16)
    lengths = (8 * len(associated)).to_bytes(8, "big") + (8 * len(sealed)).to_bytes(8, "big")
    counter = lambda n: encrypt_block(keys, nonce + n.to_bytes(4, "big"))
    hashed = ghash(encrypt_block(keys, bytes(16)), pad(associated) + pad(sealed) + lengths)
    if not hmac.compare_digest(bytes(a ^ b for a, b in zip(hashed, counter(1))), tag):
        raise ValueError("the tag does not fit")
    stream = b"".join(counter(n) for n in range(2, 2 + -(-len(sealed) // 16)))
    return bytes(a ^ b for a, b in zip(sealed, stream))
