"One workbench with a champion, and nights at copies of it"
import pytest
from nights import CANDIDATE, another, found_world, give, rewrite, run_page


@pytest.fixture(scope="session")
def world(tmp_path_factory): # -> its folder, and the champion
    root = tmp_path_factory.mktemp("gates")/"parcels"
    return root, found_world(root)


@pytest.fixture
def night(world, tmp_path):
    "A night there: other rows, files that say something else, parts that are broken. `root` and `champion` are its workbench and the model to beat"
    root = another(world[0], tmp_path/"parcels")
    def run(frame=None, files=(), swap=None, champion=world[1]):
        if frame is not None: give(root, frame)
        for change in files: rewrite(root, *change)
        return run_page(root, CANDIDATE, champion, swap)
    run.root, run.champion = root, world[1]
    return run
