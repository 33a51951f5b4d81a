"""The tree against the published known answers, and against the definition of RFC 9162 written down word for word.

The 196 cases are those of the Go library that the large transparency logs use (98 of inclusion, 98 of consistency, each a
sound proof or one way to spoil it), made here anew from its published leaves, whose roots are pinned below.
"""
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain_nb.merkle import (
    EMPTY,
    check_consistency,
    check_inclusion,
    complete,
    consistency,
    consistency_nodes,
    head,
    head_nodes,
    inclusion,
    inclusion_nodes,
    leaf_hash,
    new_nodes,
    node_hash,
    root,
    subtree,
    subtree_nodes,
)
from retrain_nb.records import UsageError

# --- The definition, recursive as in RFC 9162, section 2.1; shares nothing with the room under test ---

def split(d): return max(1 << i for i in range(len(d).bit_length()) if 1 << i < len(d))


def tree(d): # -> root of the leaf contents `d`
    if len(d) < 2: return sha256(b"\x00" + d[0] if d else b"").digest()
    return sha256(b"\x01" + tree(d[:split(d)]) + tree(d[split(d):])).digest()


def path(m, d): # -> inclusion proof of leaf `m`
    if len(d) == 1: return []
    k = split(d)
    return [*path(m, d[:k]), tree(d[k:])] if m < k else [*path(m - k, d[k:]), tree(d[:k])]


def proof(m, d, whole=True): # -> consistency proof of the first `m` leaves
    if m == len(d): return [] if whole else [tree(d)]
    k = split(d)
    return [*proof(m, d[:k], whole), tree(d[k:])] if m <= k else [*proof(m - k, d[k:], False), tree(d[:k])]


# --- Known answers ---

DATA = [bytes.fromhex(d) for d in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")]
ROOTS = """e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d
           fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125 aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77
           d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7 4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4
           76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c
           5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328""".split()
SOME = bytes.fromhex("abacaba000000000000000000000000000000000000000000060061e00123456")
U64 = 2**64 - 1 # Sizes are unsigned there: 0 - 1 is the largest of them


def test_the_roots_of_0_to_8_published_leaves():
    assert [root([leaf_hash(d) for d in DATA[:n]]).hex() for n in range(9)] == ROOTS
    assert [tree(DATA[:n]).hex() for n in range(9)] == ROOTS # So the definition above is the right one


def test_the_712_subtrees_of_130_leaves():
    # draft-ietf-plants-merkle-tree-certs: all valid subtrees, one line each, into one hash
    kept = complete([leaf_hash(bytes([i])) for i in range(130)])
    lines = [f"[{s}, {e}) {subtree(s, e, lambda *n: kept[n]).hex()}\n" for e in range(131) for s in range(e + 1) if valid(s, e)]
    assert len(lines) == 712
    assert sha256("".join(lines).encode()).hexdigest() == "b82806ad4265bb151c1119c0f4db437bb4d1a1f887b3a7fba1cd4ebf552e3e81"


def valid(start, end): # -> whether the draft calls it a subtree; ours must refuse exactly the others
    whole = start == end or start % (1 << (end - start - 1).bit_length()) == 0
    if not whole:
        with pytest.raises(UsageError, match="no subtree"): subtree_nodes(start, end)
    return whole


def flip(hashes, i, mask): return [*hashes[:i], bytes([hashes[i][0] ^ mask]) + hashes[i][1:], *hashes[i+1:]]


def inclusion_cases(): # -> (name, leaf, index, size, proof, root, whether it is sound)
    for n, (index, size) in enumerate([(0, 1), (0, 8), (5, 8), (2, 3), (1, 5)]):
        leaf, p, r = leaf_hash(DATA[index]), path(index, DATA[:size]), tree(DATA[:size])
        good = {"leaf": leaf, "index": index, "size": size, "proof": p, "root": r}
        spoiled = {"index - 1": {"index": index - 1 & U64}, "index + 1": {"index": index + 1}, "index ^ 2": {"index": index ^ 2},
                   "size * 2": {"size": size*2}, "size / 2": {"size": size//2}, "wrong leaf": {"leaf": b"WrongLeaf"},
                   "empty root": {"root": EMPTY}, "random root": {"root": SOME},
                   "trailing garbage": {"proof": [*p, b""]}, "trailing root": {"proof": [*p, r]},
                   "preceding garbage": {"proof": [b"", *p]}, "preceding root": {"proof": [r, *p]},
                   **{f"bit 3 of hash {i}": {"proof": flip(p, i, 8)} for i in range(len(p))}}
        if p: spoiled["removed"] = {"proof": p[:-1]}
        if len(p) > 1: spoiled["inserted"] = {"proof": [p[0], SOME, *p[1:]]}
        yield f"{n}: sound", *good.values(), True
        for name, change in spoiled.items(): yield f"{n}: {name}", *(good | change).values(), False
    one = leaf_hash(b"data")
    for leaf, r in ((one, one), (b"", one), (one, b""), (b"", b"")): yield f"single {leaf[:2]} {r[:2]}", leaf, 0, 1, [], r, leaf == r == one
    for index, size in ((0, 0), (0, 1), (1, 0), (2, 1)):
        for leaf, r in ((SOME, b""), (b"", EMPTY), (SOME, EMPTY)): yield f"none {index} {size} {leaf[:2]} {r[:2]}", leaf, index, size, [], r, False


def consistency_cases(): # -> (name, old, new, proof, old root, new root, whether it is sound)
    for n, (old, new) in enumerate([(1, 1), (1, 8), (6, 8), (2, 5), (6, 7)]):
        p, a, b = proof(old, DATA[:new]), tree(DATA[:old]), tree(DATA[:new])
        good = {"old": old, "new": new, "proof": p, "old_root": a, "new_root": b}
        yield f"{n}: sound", *good.values(), True
        if not p: continue
        spoiled = {"old - 1": {"old": old - 1}, "old + 1": {"old": old + 1}, "old ^ 2": {"old": old ^ 2},
                   "new * 2": {"new": new*2}, "new / 2": {"new": new//2},
                   "wrong old root": {"old_root": b"WrongRoot"}, "wrong new root": {"new_root": b"WrongRoot"},
                   "swapped roots": {"old_root": b, "new_root": a}, "empty proof": {"proof": []},
                   "trailing garbage": {"proof": [*p, b""]}, "trailing old root": {"proof": [*p, a]}, "trailing new root": {"proof": [*p, b]},
                   "preceding garbage": {"proof": [b"", *p]}, "preceding old root": {"proof": [a, *p]},
                   "preceding new root": {"proof": [b, *p]}, "preceding hash 0": {"proof": [p[0], *p]}, "truncated": {"proof": p[:-1]},
                   **{f"bit 4 of hash {i}": {"proof": flip(p, i, 16)} for i in range(len(p))}}
        for name, change in spoiled.items(): yield f"{n}: {name}", *(good | change).values(), False
    a, b = b"don't care 1", b"don't care 2"
    others = [(0, 0, a, b, []), (1, 1, a, b, []), (0, 0, a, a, []), (0, 1, a, b, []), (1, 1, b, b, []), (1, 0, a, b, []), (2, 1, a, b, []),
              (1, 2, a, b, []), (0, 0, EMPTY, b, []), (1, 1, EMPTY, b, []), (0, 0, EMPTY, EMPTY, [EMPTY]), (1, 1, EMPTY, EMPTY, [EMPTY]),
              (0, 1, EMPTY, b, []), (0, 1, EMPTY, EMPTY, [EMPTY])]
    for i, (old, new, x, y, p) in enumerate(others): yield f"other {i}", old, new, p, x, y, i == 4 # One size, one root: the only sound one


@pytest.mark.parametrize("cases, check", [(inclusion_cases, check_inclusion), (consistency_cases, check_consistency)])
def test_98_of_98_published_cases(cases, check):
    made = list(cases())
    assert len(made) == len({name for name, *_ in made}) == 98
    assert [name for name, *given, sound in made if check(*given) is not sound] == []
    assert sum(sound for *_, sound in made) == 6


# --- Any tree ---

def grown(n): # -> contents of `n` leaves, all different
    return [b"%d" % i for i in range(n)]


KEPT = complete([leaf_hash(d) for d in grown(300)])


class Asked(dict):
    "What a store has fetched; whatever else is asked for is an error"
    def get(self, level, index): return self[level, index]


def fetched(nodes): # -> a `get` that knows these nodes only
    assert len(nodes) == len(set(nodes))
    return Asked({n: KEPT[n] for n in nodes}).get


SIZES = st.integers(1, 300)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.data())
def test_any_proof_is_the_one_of_the_definition_and_any_flip_is_found(size, draw):
    index, old = draw.draw(st.integers(0, size - 1)), draw.draw(st.integers(1, size))
    data = grown(size)
    a, b = head(old, fetched(head_nodes(old))), head(size, fetched(head_nodes(size)))
    assert (a, b) == (tree(data[:old]), tree(data)) and b == root([leaf_hash(d) for d in data])
    p, q = inclusion(index, size, fetched(inclusion_nodes(index, size))), consistency(old, size, fetched(consistency_nodes(old, size)))
    assert (p, q) == (path(index, data), proof(old, data))
    leaf = leaf_hash(data[index])
    assert check_inclusion(leaf, index, size, p, b) and check_consistency(old, size, q, a, b)
    assert len(head_nodes(size)) == size.bit_count() and len(p) <= (size - 1).bit_length() and len(q) <= (size - 1).bit_length() + 1
    at, bit = draw.draw(st.integers(0, 31)), 1 << draw.draw(st.integers(0, 7))
    def bent(h): return h[:at] + bytes([h[at] ^ bit]) + h[at+1:]
    for i in range(len(p)): assert not check_inclusion(leaf, index, size, [*p[:i], bent(p[i]), *p[i+1:]], b)
    for i in range(len(q)): assert not check_consistency(old, size, [*q[:i], bent(q[i]), *q[i+1:]], a, b)
    assert not check_inclusion(bent(leaf), index, size, p, b) and not check_inclusion(leaf, index, size, p, bent(b))
    assert not check_consistency(old, size, q, bent(a), b) and not check_consistency(old, size, q, a, bent(b))
    for other in {*range(size)} - {index}: assert not check_inclusion(leaf, other, size, p, b)
    for wrong in ([*p, b], p[:-1] if p else [a], p[::-1] if len(p) > 1 else [leaf]): assert not check_inclusion(leaf, index, size, wrong, b)
    for wrong in ([*q, b], q[:-1] if q else [a], q[::-1] if len(q) > 1 else [b, a]): assert not check_consistency(old, size, wrong, a, b)


def test_appending_needs_one_query_and_completes_every_subtree_once():
    kept = {}
    for n, data in enumerate(grown(300)):
        before = Asked({node: kept[node] for node in head_nodes(n)})
        made = new_nodes(n, leaf_hash(data), before.get)
        before |= {(0, n): leaf_hash(data)} | {(level, index): h for level, index, h in made}
        assert not before.keys() - {*head_nodes(n)} & kept.keys()
        assert head(n + 1, before.get) == head(n + 1, fetched(head_nodes(n + 1)))
        kept |= before
    assert kept == KEPT


def test_up_to_40_leaves_only_the_true_place_and_the_true_older_size_pass():
    # The newer size is in no hash, as the room says, so nothing is claimed of it
    for size in range(1, 41):
        data, b = grown(size), head(size, fetched(head_nodes(size)))
        for old in range(1, size + 1):
            q, a = proof(old, data), tree(data[:old])
            assert [m for m in range(-1, size + 2) if check_consistency(m, size, q, a, b)] == [old]
            assert [m for m in range(-1, size + 2) if check_inclusion(leaf_hash(data[old-1]), m, size, path(old - 1, data), b)] == [old - 1]


SHAPES = st.lists(st.binary(max_size=40) | st.sampled_from([EMPTY, SOME]), max_size=70)
NUMBERS = st.integers(-3, 40) | st.integers(-2**70, 2**70)


@settings(max_examples=200, deadline=None)
@given(NUMBERS, NUMBERS, SHAPES, st.binary(max_size=40), st.binary(max_size=40))
def test_made_up_bytes_are_false_and_never_raise(m, n, p, x, y):
    assert check_inclusion(x, m, n, p, y) is False
    assert check_consistency(m, n, p, x, y) is (m == n >= 1 and not p and x == y)


@pytest.mark.parametrize("call", [
    lambda get: inclusion(-1, 3, get), lambda get: inclusion(3, 3, get), lambda get: inclusion_nodes(0, 0), lambda get: head(-1, get),
    lambda get: consistency(0, 3, get), lambda get: consistency(4, 3, get), lambda get: consistency_nodes(-1, 3), lambda get: subtree(4, 2, get)])
def test_what_cannot_be_proved_is_refused(call):
    with pytest.raises(UsageError): call(lambda level, index: KEPT[level, index])


def test_a_leaf_cannot_pass_for_a_node():
    left, right = leaf_hash(b"a"), leaf_hash(b"b")
    assert leaf_hash(left + right) != node_hash(left, right) and root([]) == EMPTY == head(0, KEPT.get)
