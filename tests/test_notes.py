"Signed formats against their published vectors, against the real ssh-keygen, and against whoever spoils them."
import base64
import hashlib
import os
import shutil
import subprocess
import time

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain_nb.merkle import check_inclusion, complete, head, inclusion, leaf_hash
from retrain_nb.notes import (
    Checkpoint,
    check_envelope,
    check_note,
    check_ssh_signature,
    checkpoint_text,
    find_checkpoint,
    fingerprint,
    key_id,
    pae,
    parse_checkpoint,
    parse_ssh_public,
    parse_tlog_proof,
    parse_vkey,
    sign_envelope,
    sign_note,
    ssh_public,
    ssh_signature,
    tlog_proof,
    vkey,
)
from retrain_nb.records import RetrainError, UsageError, VerificationError

KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([i])*32) for i in range(1, 4)]
OURS, WITNESS, STRANGER = KEYS
PUBLIC, WITNESSING, STRANGE = (k.public_key().public_bytes_raw() for k in KEYS)
NAME = "example.com/flights"
VKEYS = [vkey(NAME, PUBLIC), vkey("example.com/witness", WITNESSING)]
TEXT = checkpoint_text(Checkpoint(NAME, 3, hashlib.sha256(b"root").digest()))
NOTE = sign_note(TEXT, NAME, PUBLIC, OURS.sign)
COSIGNED = NOTE + sign_note(TEXT, "example.com/witness", WITNESSING, WITNESS.sign).rpartition("\n\n")[2]


# --- Known answers ---

def test_the_example_of_the_note_specification():
    key = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"
    line = "— example.com/foo Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1ERYNZXsYjOBH3mFXmRKuwHjG1Yu72IneyaQM=\n"
    assert check_note(f"This is an example message.\n\n{line}", [key]) == ("This is an example message.\n", key)
    name, public = parse_vkey(key)
    assert vkey(name, public) == key and key_id(name, public).hex() == "530d903a"
    with pytest.raises(VerificationError, match="does not fit"): check_note(f"This is an example massage.\n\n{line}", [key])


def test_a_note_signed_here_is_byte_for_byte_the_one_of_the_go_package():
    # The example of golang.org/x/mod/sumdb/note, whose private key is printed there
    key = base64.b64decode("AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz")
    private = Ed25519PrivateKey.from_private_bytes(key[1:])
    text = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
    assert vkey("PeterNeumann", private.public_key().public_bytes_raw()) == "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
    assert sign_note(text, "PeterNeumann", private.public_key().public_bytes_raw(), private.sign) == (
        f"{text}\n— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n")


def test_the_example_of_the_dsse_protocol():
    signed = pae("http://example.com/HelloWorld", b"hello world")
    assert signed == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    d = 97358161215184420915383655311931858321456579547487070936769975997791359926199
    theirs = base64.b64decode("A3JqsQGtVsJ2O2xqrI5IcnXip5GToJ3F+FnZ+O88SjtR6rDAajabZKciJTfUiHqJPcIAriEGAHTVeCUjW2JIZA==")
    r, s = (int.from_bytes(half, "big") for half in (theirs[:32], theirs[32:]))
    ec.derive_private_key(d, ec.SECP256R1()).public_key().verify(encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA256()))


def test_a_type_is_counted_in_bytes():
    assert pae("modèle", b"\xff") == b"DSSEv1 7 mod\xc3\xa8le 1 \xff" and pae("", b"") == b"DSSEv1 0  0 "
    envelope = sign_envelope("größe".encode(), "modèle", PUBLIC, OURS.sign)
    assert check_envelope(envelope, [PUBLIC]) == ("modèle", "größe".encode())


# --- Notes and checkpoints ---

def test_a_witness_may_sign_as_well_and_unknown_keys_are_ignored():
    assert [check_note(COSIGNED, [key]) for key in VKEYS] == [(TEXT, key) for key in VKEYS]
    assert check_note(COSIGNED, [vkey("example.com/other", STRANGE), VKEYS[1]]) == (TEXT, VKEYS[1])
    with pytest.raises(VerificationError, match="by none of the keys"): check_note(COSIGNED, [vkey("example.com/other", STRANGE)])
    assert check_note(NOTE + NOTE.splitlines()[-1] + "\n", VKEYS) == (TEXT, VKEYS[0]) # Said twice


def test_one_wrong_signature_in_a_known_name_condemns_the_note():
    _, _, lines = COSIGNED.rpartition("\n\n")
    ours, theirs = lines.splitlines(keepends=True)
    wrong = "— example.com/witness " + base64.b64encode(key_id("example.com/witness", WITNESSING) + OURS.sign(TEXT.encode())).decode() + "\n"
    assert check_note(f"{TEXT}\n{ours}{wrong}", VKEYS[:1]) == (TEXT, VKEYS[0]) # Who does not know the witness cannot tell
    with pytest.raises(VerificationError, match="signature of example.com/witness does not fit"): check_note(f"{TEXT}\n{ours}{wrong}", VKEYS)
    assert check_note(f"{TEXT}\n{theirs}{ours}", VKEYS) == (TEXT, VKEYS[1])


def test_a_stranger_with_our_name_is_a_stranger():
    note = sign_note(TEXT, NAME, STRANGE, STRANGER.sign)
    with pytest.raises(VerificationError, match="by none"): check_note(note, VKEYS)
    forged = f"{TEXT}\n— {NAME} {base64.b64encode(key_id(NAME, PUBLIC) + STRANGER.sign(TEXT.encode())).decode()}\n"
    with pytest.raises(VerificationError, match="does not fit"): check_note(forged, VKEYS)


def test_16_signatures_are_read_and_a_thousand_are_not():
    line = NOTE.splitlines()[-1] + "\n"
    assert check_note(NOTE + line*15, VKEYS) == (TEXT, VKEYS[0])
    with pytest.raises(VerificationError, match="has 1000 signatures"): check_note(NOTE + line*999, VKEYS)


SIGNATURE = NOTE.splitlines()[-1]
MALFORMED = ["", "\n", TEXT, TEXT + "\n", TEXT + SIGNATURE + "\n", NOTE[:-1], NOTE + "\n", NOTE + "x\n", NOTE.replace("— ", "- "), NOTE.replace("— ", "—"),
             NOTE.replace("— ", "—  "), NOTE.replace("\n", "\r\n"), NOTE.replace(NAME + " ", NAME + "+a "), NOTE.replace(f"— {NAME}", "— "),
             NOTE.replace("=\n", "\n"), NOTE[:-1] + "=\n", NOTE[:-1] + " \n", f"{TEXT}\n— {NAME} AAAA\n", f"{TEXT}\n— {NAME}\u00a0x AAAAAAAA\n",
             "\x00" + NOTE, NOTE.replace("3", "3\t"), "\ud800" + NOTE, f"\n\n{SIGNATURE}\n\n"]


@pytest.mark.parametrize("note", MALFORMED, ids=range(len(MALFORMED)))
def test_what_is_no_note_is_refused(note):
    with pytest.raises(VerificationError): check_note(note, VKEYS)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(NOTE) - 1), st.characters(exclude_categories=["Cs"]))
def test_any_changed_character_is_found(at, c):
    note = NOTE[:at] + c + NOTE[at+1:]
    if note == NOTE: return
    with pytest.raises(VerificationError): check_note(note, VKEYS)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.just("\n"), max_size=80))
def test_any_text_comes_back_whole(text):
    note = sign_note(text + "\n", NAME, PUBLIC, OURS.sign)
    assert check_note(note, VKEYS) == (text + "\n", VKEYS[0])


@pytest.mark.parametrize("text", ["", "x", "a\tb\n", "a\r\n", "\ud800\n"])
def test_what_no_note_can_say_is_not_signed(text):
    with pytest.raises(UsageError, match="cannot be signed"): sign_note(text, NAME, PUBLIC, OURS.sign)


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\u2003b", "a\n", "a\x7f"])
def test_what_cannot_name_a_key_does_not(name):
    with pytest.raises(UsageError, match="cannot name a key"): vkey(name, PUBLIC)
    with pytest.raises(UsageError, match="cannot name a key"): sign_note(TEXT, name, PUBLIC, OURS.sign)


GOOD = VKEYS[0]
SHORT = base64.b64encode(b"\x01" + PUBLIC[:31]).decode()
ECDSA = base64.b64encode(b"\x02" + PUBLIC).decode()


@pytest.mark.parametrize("text", ["", NAME, GOOD + "\n", GOOD.upper(), GOOD + "=", GOOD[:-4], f"{NAME}+{key_id(NAME, PUBLIC).hex()}+{SHORT}",
                                  f"{NAME}+{key_id(NAME, PUBLIC).hex()}+{ECDSA}", "x" + GOOD, GOOD.replace("+", "++", 1)])
def test_what_is_no_verifier_key_is_refused(text):
    with pytest.raises(UsageError, match="no verifier key"): check_note(NOTE, [text])
    with pytest.raises(UsageError, match="no key to check"): check_note(NOTE, [])


ROOT64 = TEXT.splitlines()[2]


@pytest.mark.parametrize("size", ["", "03", "+3", "-3", "3 ", " 3", "3.0", "1e3", "٣", "18446744073709551616", "9"*5000])
def test_a_size_has_one_spelling(size):
    assert parse_checkpoint(TEXT) == Checkpoint(NAME, 3, hashlib.sha256(b"root").digest())
    with pytest.raises(VerificationError, match="no checkpoint"): parse_checkpoint(f"{NAME}\n{size}\n{ROOT64}\n")


@pytest.mark.parametrize("text", ["", NAME + "\n3\n", f"\n3\n{ROOT64}\n", f"{NAME}\n3\n{ROOT64}", f"{NAME}\n3\n{ROOT64}\n\n", f"{NAME}\n3\n{ROOT64[:-2]}B=\n",
                                  f"{NAME}\n3\n{ROOT64[4:]}\n", f"{NAME}\n3\n{ROOT64}\n\nextension\n", NOTE, f"a\tb\n3\n{ROOT64}\n"])
def test_what_is_no_checkpoint_is_refused(text):
    with pytest.raises(VerificationError, match="no checkpoint"): parse_checkpoint(text)


def test_extensions_of_other_logs_and_the_ends_of_the_range_are_read():
    assert parse_checkpoint(TEXT + "timestamp 1\nanother\n").size == 3
    for size in (0, 2**64 - 1): assert parse_checkpoint(checkpoint_text(Checkpoint(NAME, size, bytes(32)))).size == size
    for wrong in ({"size": -1}, {"size": 2**64}, {"root": b"x"}, {"origin": ""}, {"origin": "a\nb"}):
        with pytest.raises(UsageError): Checkpoint(**({"origin": NAME, "size": 3, "root": bytes(32)} | wrong))


def test_a_checkpoint_is_found_in_pages_mails_and_listings():
    extended = sign_note(TEXT + "extension\n", NAME, PUBLIC, OURS.sign)
    for note in (NOTE, COSIGNED, extended):
        escaped = note.replace("—", "&#8212;").replace("+", "&#43;").replace("=", "&#61;")
        for page in (f"<pre>{note}</pre>", f"<pre>\n{note}</pre>", f"<pre>{note[:-1]}</pre>", f"<p>p < 0.05 > x</p><pre id=a class='b'><code>{escaped}</code></pre>",
                     f"Dear all,\nAUC < 0.7\n\n{note}\n-- \n<a@example.com>\n", note.replace("\n", "\r\n"), f"<pre>{note}</pre>" * 2, note[:-1]):
            assert find_checkpoint(page) == note, page
            assert check_note(find_checkpoint(page), VKEYS)[1] == VKEYS[0]


def test_a_hostile_page_takes_no_time():
    # The repeated line took a minute while extension lines were without number
    line = f"a\n0\n{'A'*43}=\n"
    for page in ("<"*10**6, "<a "*10**6, "a\n1\n"*10**5, "\n\n— a "*10**5, line*10**4, line + "x\n"*10**5, "&"*10**6):
        start = time.process_time()
        with pytest.raises(UsageError, match="no signed checkpoint"): find_checkpoint(page)
        assert time.process_time() - start < 5


def test_a_proof_file_holds_all_that_is_needed():
    leaves = [leaf_hash(b"%d" % i) for i in range(11)]
    kept = complete(leaves)
    def get(level, index): return kept[level, index]
    note = sign_note(checkpoint_text(Checkpoint(NAME, 11, head(11, get))), NAME, PUBLIC, OURS.sign)
    for i in range(11):
        file = tlog_proof(i, inclusion(i, 11, get), note)
        for text in (file, file.replace("\nindex", "\nextra AAAA\nindex")):
            index, proof, signed = parse_tlog_proof(text)
            checkpoint = parse_checkpoint(check_note(signed, VKEYS)[0])
            assert check_inclusion(leaves[i], index, checkpoint.size, proof, checkpoint.root)
    assert parse_tlog_proof(tlog_proof(0, [], note)) == (0, [], note)
    for spoil in (("=\n", "= ", 1), ("proof@v1", "proof@v2"), ("index 10", "index 010"), ("index 10\n", ""), ("=\n", "\n"), ("\n\n", "\n"), ("index 10\n", "index 10\nAAAA\n"), (note, "")):
        with pytest.raises(VerificationError, match="no proof file"): parse_tlog_proof(file.replace(*spoil))


# --- OpenSSH ---

needs_ssh = pytest.mark.skipif(not shutil.which("ssh-keygen") and not os.environ.get("CI"),
                               reason="no ssh-keygen here; `apt-get install openssh-client` brings it, and CI always has it")
MESSAGE = b"promote 5f\n"


def keygen(*args, cwd, stdin=b""): # -> (whether ssh-keygen agreed, what it said)
    done = subprocess.run(["ssh-keygen", *args], cwd=cwd, input=stdin, capture_output=True)
    return done.returncode == 0, (done.stdout + done.stderr).decode()


def ssh_says(folder, signature, message=MESSAGE, namespace="retrain-nb", public=PUBLIC):
    (folder/"allowed").write_text(f"someone@example.com {ssh_public(public)}\n")
    (folder/"message.sig").write_text(signature)
    return keygen("-Y", "verify", "-f", "allowed", "-I", "someone@example.com", "-n", namespace, "-s", "message.sig", cwd=folder, stdin=message)[0]


@needs_ssh
def test_ssh_keygen_accepts_what_we_sign_and_refuses_what_we_did_not(tmp_path):
    for message in (MESSAGE, b"", b"\0"*100_000):
        assert ssh_says(tmp_path, ssh_signature(message, PUBLIC, OURS.sign, "retrain-nb"), message)
    signature = ssh_signature(MESSAGE, PUBLIC, OURS.sign, "retrain-nb")
    assert not ssh_says(tmp_path, signature, message=b"promote 6a\n")
    assert not ssh_says(tmp_path, signature, namespace="git")
    assert not ssh_says(tmp_path, signature, public=STRANGE)
    assert not ssh_says(tmp_path, ssh_signature(MESSAGE, PUBLIC, STRANGER.sign, "retrain-nb"))


@needs_ssh
@pytest.mark.parametrize("kind", ["sha512", "sha256"])
def test_we_accept_what_ssh_keygen_signs_and_refuse_what_it_did_not(tmp_path, kind):
    for name in ("mine", "theirs"): assert keygen("-q", "-t", "ed25519", "-N", "", "-C", "someone@example.com", "-f", name, cwd=tmp_path)[0]
    mine, theirs = (parse_ssh_public((tmp_path/f"{name}.pub").read_text()) for name in ("mine", "theirs"))
    (tmp_path/"message").write_bytes(MESSAGE)
    assert keygen("-Y", "sign", "-q", "-f", "mine", "-n", "retrain-nb", "-O", f"hashalg={kind}", "message", cwd=tmp_path)[0]
    armoured = (tmp_path/"message.sig").read_text()
    assert check_ssh_signature(armoured, MESSAGE, "retrain-nb") == mine != theirs
    with pytest.raises(VerificationError, match="is for 'retrain-nb', not for 'git'"): check_ssh_signature(armoured, MESSAGE, "git")
    with pytest.raises(VerificationError, match="does not fit the message"): check_ssh_signature(armoured, MESSAGE[:-1], "retrain-nb")
    assert ssh_public(mine, "someone@example.com") == (tmp_path/"mine.pub").read_text().strip()
    assert fingerprint(mine) in keygen("-l", "-f", "mine.pub", cwd=tmp_path)[1]


@needs_ssh
def test_a_signature_by_another_kind_of_key_is_named(tmp_path):
    assert keygen("-q", "-t", "ecdsa", "-N", "", "-f", "other", cwd=tmp_path)[0]
    (tmp_path/"message").write_bytes(MESSAGE)
    assert keygen("-Y", "sign", "-q", "-f", "other", "-n", "retrain-nb", "message", cwd=tmp_path)[0]
    with pytest.raises(VerificationError, match="not made by an Ed25519 key"): check_ssh_signature((tmp_path/"message.sig").read_text(), MESSAGE, "retrain-nb")
    with pytest.raises(UsageError, match="'ecdsa-sha2-nistp256' is no kind"): parse_ssh_public((tmp_path/"other.pub").read_text())


ARMOURED = ssh_signature(MESSAGE, PUBLIC, OURS.sign, "retrain-nb")
BLOB = base64.b64decode("".join(ARMOURED.splitlines()[1:-1]))


def armour(blob): return f"-----BEGIN SSH SIGNATURE-----\n{base64.b64encode(blob).decode()}\n-----END SSH SIGNATURE-----\n"


def test_every_flipped_byte_and_every_cut_of_an_ssh_signature_is_found():
    assert check_ssh_signature(armour(BLOB), MESSAGE, "retrain-nb") == PUBLIC # However its lines are broken
    for i in range(len(BLOB)):
        for spoiled in (BLOB[:i], BLOB[:i] + bytes([BLOB[i] ^ 1]) + BLOB[i+1:], BLOB[:i] + bytes([BLOB[i] ^ 0x80]) + BLOB[i+1:]):
            with pytest.raises(VerificationError): check_ssh_signature(armour(spoiled), MESSAGE, "retrain-nb")
    reserved = BLOB.replace(b"\0\0\0\0\0\0\0\6sha512", b"\0\0\0\1x\0\0\0\6sha512")
    assert reserved != BLOB
    for text in (armour(reserved), "", "x", ARMOURED.splitlines()[0], ARMOURED.replace("BEGIN SSH", "BEGIN PGP"), ARMOURED.replace("\n", ""), armour(BLOB + b"\0")):
        with pytest.raises(VerificationError): check_ssh_signature(text, MESSAGE, "retrain-nb")


def test_a_namespace_and_a_comment_are_one_plain_line():
    for namespace in ("", "a\nb"):
        with pytest.raises(UsageError, match="cannot be a namespace"): ssh_signature(MESSAGE, PUBLIC, OURS.sign, namespace)
    with pytest.raises(UsageError, match="cannot be the comment"): ssh_public(PUBLIC, "a\nssh-ed25519 AAAA")
    line = ssh_public(PUBLIC, "a b c")
    assert parse_ssh_public(line + "\n") == PUBLIC
    for text in ("", "ssh-ed25519", "ssh-ed25519 AAAA", line[:60], line.replace("ssh-ed25519 ", "ssh-ed25519  "), f"{line}\n{line}"):
        with pytest.raises(UsageError): parse_ssh_public(text)


# --- Envelopes ---

ENVELOPE = sign_envelope(b'{"model": "5f"}', "application/vnd.in-toto+json", PUBLIC, OURS.sign)


def test_the_id_of_a_key_is_never_trusted():
    [signature] = ENVELOPE["signatures"]
    for lie in ({"keyid": fingerprint(STRANGE)}, {"keyid": None}, {"keyid": ""}):
        assert check_envelope(ENVELOPE | {"signatures": [signature | lie]}, [PUBLIC])[1] == b'{"model": "5f"}'
        with pytest.raises(VerificationError, match="none of its signatures"): check_envelope(ENVELOPE | {"signatures": [signature | lie]}, [STRANGE])
    no_id = {"sig": signature["sig"]}
    assert check_envelope(ENVELOPE | {"signatures": [{"sig": base64.b64encode(bytes(64)).decode()}, no_id]}, [STRANGE, PUBLIC])
    with pytest.raises(UsageError, match="no key to check"): check_envelope(ENVELOPE, [])


def test_either_alphabet_of_base64_is_read():
    payload = bytes(range(256))
    envelope = sign_envelope(payload, "x", PUBLIC, OURS.sign)
    other = {**envelope, "payload": base64.urlsafe_b64encode(payload).decode()}
    assert other != envelope and check_envelope(other, [PUBLIC]) == check_envelope(envelope, [PUBLIC]) == ("x", payload)


SIG = ENVELOPE["signatures"][0]["sig"]


@pytest.mark.parametrize("envelope", [
    None, [], "x", {}, {**ENVELOPE, "payload": 1}, {**ENVELOPE, "payload": "eyI"}, {**ENVELOPE, "payloadType": None}, {**ENVELOPE, "payloadType": "a\ud800"},
    {**ENVELOPE, "signatures": []}, {**ENVELOPE, "signatures": {}}, {**ENVELOPE, "signatures": [None]}, {**ENVELOPE, "signatures": [{"sig": None}]},
    {**ENVELOPE, "signatures": [{"sig": SIG + "\n"}]}, {**ENVELOPE, "signatures": [{"sig": SIG}]*101}, {**ENVELOPE, "payload": "ä"}])
def test_what_is_no_envelope_is_refused(envelope):
    with pytest.raises(VerificationError, match="no DSSE envelope"): check_envelope(envelope, [PUBLIC])


@pytest.mark.parametrize("change", [{"payloadType": "application/vnd.in-toto+jsoN"}, {"payload": base64.b64encode(b'{"model": "5e"}').decode()},
                                    {"signatures": [{"sig": ""}]}, {"signatures": [{"sig": SIG[:4]}]}])
def test_a_changed_envelope_is_found(change):
    with pytest.raises(VerificationError, match="none of its signatures"): check_envelope(ENVELOPE | change, [PUBLIC])


def test_a_key_of_the_wrong_length_is_the_callers_mistake():
    for call in (lambda: vkey(NAME, b"x"), lambda: ssh_public(b"x"), lambda: check_envelope(ENVELOPE, [b"x"]), lambda: fingerprint(PUBLIC + b"x")):
        with pytest.raises(UsageError, match="has 32 bytes"): call()


JSON = st.recursive(st.none() | st.integers() | st.text(max_size=5) | st.sampled_from([SIG, ENVELOPE["payload"]]),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*ENVELOPE, "sig", "keyid"]), inner, max_size=3), max_leaves=8)


@settings(max_examples=200, deadline=None)
@given(JSON, st.text(max_size=60))
def test_made_up_input_never_raises_anything_unexpected(value, text):
    checks = [lambda: check_envelope(value, [PUBLIC]), lambda: check_note(text, VKEYS), lambda: check_ssh_signature(text, b"", "x"), lambda: parse_checkpoint(text),
              lambda: parse_vkey(text), lambda: parse_ssh_public(text), lambda: parse_tlog_proof(text), lambda: find_checkpoint(text)]
    for check in checks:
        with pytest.raises(RetrainError): check()
