"Keys on disk: what is refused, what never leaks, and that the real ssh-keygen agrees."
import copy
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from retrain_nb.digest import canonical
from retrain_nb.notes import Checkpoint, check_note, check_ssh_signature, checkpoint_text, fingerprint, parse_ssh_public, sign_note
from retrain_nb.records import RetrainError, UsageError, as_json
from retrain_nb.stores.keys import load_key, make_key, sign_ssh

needs_ssh = pytest.mark.skipif(not shutil.which("ssh-keygen") and not os.environ.get("CI"),
                               reason="no ssh-keygen here; `apt-get install openssh-client` brings it, and CI always has it")
NAME = "example.com/flights"


def keygen(*args, cwd, stdin=b""): # -> (whether ssh-keygen agreed, what it said)
    done = subprocess.run(["ssh-keygen", *args], cwd=cwd, input=stdin, capture_output=True)
    return done.returncode == 0, (done.stdout + done.stderr).decode()


def mode(path): return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def key(tmp_path):
    make_key(tmp_path/"key", "flights workbench")
    return tmp_path/"key"


# --- With the real ssh-keygen ---

@needs_ssh
def test_ssh_keygen_reads_our_key_and_accepts_what_it_signs(key):
    signer, folder = load_key(key, NAME), key.parent
    agreed, said = keygen("-y", "-f", "key", cwd=folder)
    assert agreed and parse_ssh_public(said) == signer.public == parse_ssh_public((folder/"key.pub").read_text())
    assert (folder/"key.pub").read_text().split(" ", 2)[2] == "flights workbench\n"
    assert fingerprint(signer.public) in keygen("-l", "-f", "key", cwd=folder)[1]
    (folder/"allowed").write_text(f"night {signer.ssh}\n")
    (folder/"message.sig").write_text(sign_ssh(signer, b"hello", "retrain-nb"))
    verify = ("-Y", "verify", "-f", "allowed", "-I", "night", "-n", "retrain-nb", "-s", "message.sig")
    assert keygen(*verify, cwd=folder, stdin=b"hello")[0]
    assert not keygen(*verify, cwd=folder, stdin=b"hallo")[0]


@needs_ssh
def test_a_key_of_ssh_keygen_signs_here_as_it_does_there(tmp_path):
    assert keygen("-q", "-t", "ed25519", "-N", "", "-C", "someone@example.com", "-f", "own", cwd=tmp_path)[0]
    (tmp_path/"message").write_bytes(b"hello")
    assert keygen("-Y", "sign", "-q", "-f", "own", "-n", "retrain-nb", "message", cwd=tmp_path)[0]
    assert sign_ssh(load_key(tmp_path/"own", NAME), b"hello", "retrain-nb") == (tmp_path/"message.sig").read_text()


@needs_ssh
@pytest.mark.parametrize("args, says, cure", [
    (["-t", "ed25519", "-N", "secret"], "has a passphrase", "-N ''"), (["-t", "rsa", "-b", "2048", "-N", "secret"], "has a passphrase", "-N ''"),
    (["-t", "ed25519", "-N", "secret", "-Z", "chacha20-poly1305@openssh.com"], "has a passphrase", "-N ''"),
    (["-t", "rsa", "-b", "2048", "-N", ""], "of the kind RSA", "ed25519"), (["-t", "ecdsa", "-N", ""], "of the kind EC", "ed25519"),
    (["-t", "rsa", "-b", "2048", "-m", "PEM", "-N", ""], "not in the format of OpenSSH", "ed25519")])
def test_another_kind_of_key_is_named_with_its_cure(tmp_path, args, says, cure):
    agreed, said = keygen("-q", *args, "-f", "key", cwd=tmp_path)
    assert agreed, said
    with pytest.raises(UsageError, match=says) as error: load_key(tmp_path/"key", NAME)
    assert cure in error.value.cure and str(tmp_path/"key") in str(error.value)


# --- Files ---

def test_a_key_is_its_owners_alone_whatever_the_umask(tmp_path):
    for umask in (0o000, 0o022, 0o077, 0o777):
        before = os.umask(umask)
        try: make_key(tmp_path/f"key{umask}", "")
        finally: os.umask(before)
        assert (mode(tmp_path/f"key{umask}"), mode(tmp_path/f"key{umask}.pub")) == (0o600, 0o644)
        load_key(tmp_path/f"key{umask}", NAME)
    assert [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def test_a_key_is_never_open_to_others_while_it_is_written():
    # The mode at the moment each file is created, with a umask that forbids nothing
    script = """
import os, sys
from retrain_nb.stores.keys import make_key
seen, real = [], os.open
def spy(name, flags, mode=0o777, **more):
    fd = real(name, flags, mode, **more)
    if flags & os.O_CREAT or flags & os.O_TMPFILE == os.O_TMPFILE: seen.append(oct(os.fstat(fd).st_mode & 0o777))
    return fd
os.umask(0); os.open = spy
make_key(sys.argv[1], "")
print(seen)
"""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", script, f"{folder}/key"], capture_output=True, text=True, check=True)
    assert done.stdout == "['0o600', '0o644']\n"


@pytest.mark.parametrize("there", ["key", "key.pub"])
def test_a_key_is_never_overwritten(tmp_path, there):
    (tmp_path/there).write_text("what was there")
    with pytest.raises(UsageError, match="never overwritten"): make_key(tmp_path/"key", "")
    assert (tmp_path/there).read_text() == "what was there" and len(list(tmp_path.iterdir())) == 1
    (tmp_path/there).unlink()
    (tmp_path/there).symlink_to(tmp_path/"nowhere")
    with pytest.raises(UsageError, match="never overwritten"): make_key(tmp_path/"key", "")
    assert not (tmp_path/"nowhere").exists()


def test_of_eight_that_make_the_same_key_at_once_one_does(tmp_path):
    script = "import sys; from retrain_nb.stores.keys import make_key; sys.stdin.read(1); make_key(sys.argv[1], sys.argv[2])"
    makers = [subprocess.Popen([sys.executable, "-c", script, tmp_path/"key", f"maker {i}"], stdin=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(8)]
    for maker in makers: maker.stdin.write(b"x"); maker.stdin.flush()
    said = [(maker.wait(), maker.communicate()[1].decode()) for maker in makers]
    assert sorted(code for code, _ in said) == [0] + [1]*7
    assert all("never overwritten" in text for code, text in said if code)
    winner = next(i for i, (code, _) in enumerate(said) if code == 0)
    assert (tmp_path/"key.pub").read_text().endswith(f"maker {winner}\n")
    assert load_key(tmp_path/"key", NAME).public == parse_ssh_public((tmp_path/"key.pub").read_text())


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o644, 0o666, 0o777])
def test_a_key_that_others_may_touch_is_refused(key, bits):
    key.chmod(bits)
    with pytest.raises(UsageError, match=f"mode {bits:o}") as error: load_key(key, NAME)
    assert "chmod 600" in error.value.cure
    for narrow in (0o600, 0o400, 0o700):
        key.chmod(narrow)
        load_key(key, NAME)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path/"pipe", 0o600)
    for path, says in ((tmp_path, "cannot be read|no file"), (tmp_path/"pipe", "no file"), (tmp_path/"nowhere", "no key at"), (Path("/dev/null"), "no file")):
        with pytest.raises(UsageError, match=says): load_key(path, NAME)


@pytest.mark.parametrize("name", ["", "a b", "a+b"])
def test_a_name_that_no_note_allows_is_refused_when_the_key_is_loaded(key, name):
    with pytest.raises(UsageError, match="cannot name a key"): load_key(key, name)


def test_the_public_half_is_no_private_one(key):
    key.with_name("key.pub").chmod(0o600)
    with pytest.raises(UsageError, match="is the public half") as error: load_key(key.with_name("key.pub"), NAME)
    assert "without `.pub`" in error.value.cure


def test_a_comment_of_two_lines_makes_no_key(tmp_path):
    with pytest.raises(UsageError, match="comment"): make_key(tmp_path/"key", "a\nssh-ed25519 AAAA")
    assert list(tmp_path.iterdir()) == []


# --- Damage ---

def test_each_damaged_key_is_refused_or_is_the_same_key(key):
    whole, public = key.read_bytes(), load_key(key, NAME).public
    refused = 0
    for at in range(len(whole)):
        for spoiled in (whole[:at] + bytes([whole[at] ^ 1]) + whole[at+1:], whole[:at]):
            key.write_bytes(spoiled)
            try: signer = load_key(key, NAME)
            except UsageError as e:
                refused += 1
                assert not any(line in str(e).encode() for line in whole.split(b"\n")[1:-2])
            else:
                assert signer.public == public # A flip in the white space or in what no field holds
                assert check_ssh_signature(sign_ssh(signer, b"x", "x"), b"x", "x") == public
    assert refused > 1.5*len(whole)


# --- Secrets ---

def test_the_private_half_appears_nowhere(key):
    signer, seed = load_key(key, NAME), private_half(key)
    shown = [repr(signer), str(signer), f"{signer}", repr([signer]), repr(vars(signer)), signer.vkey, signer.ssh, repr(as_json(signer)), repr(signer.__getstate__())]
    for spelled in (repr(seed)[2:-1], seed.hex(), seed.decode("latin-1")): assert not any(spelled in text for text in shown)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(UsageError, match="not copied"): pickle.dumps(signer, protocol)
    for copied in (copy.copy, copy.deepcopy, lambda s: pickle.dumps([s]), lambda s: canonical(as_json(s))):
        with pytest.raises(RetrainError): copied(signer)
    with pytest.raises(TypeError): json.dumps(signer)
    with pytest.raises(AttributeError): signer.public = b""
    assert json.dumps(signer, default=str) == json.dumps(str(signer))
    assert signer == load_key(key, NAME) and hash(signer) == hash(load_key(key, NAME))


def private_half(key):
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    return load_ssh_private_key(key.read_bytes(), None).private_bytes_raw()


def test_a_loaded_key_signs_a_checkpoint(key):
    signer = load_key(key, NAME)
    note = sign_note(checkpoint_text(Checkpoint(NAME, 0, bytes(32))), signer.name, signer.public, signer.sign)
    assert check_note(note, [signer.vkey])[1] == signer.vkey
