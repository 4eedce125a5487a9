"""The page allocator against a model of it, over random histories."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxserve.engine.pages import DUMMY_PAGE, PageAllocator, hash_page, root_hash

NUM_PAGES = 9


class AllocatorMachine(RuleBasedStateMachine):
    """Owners hold lists of pages; content is what was registered last under a hash and not handed out since."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(NUM_PAGES, enable_prefix_caching=True)
        self.owned: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    @rule(count=st.integers(0, NUM_PAGES))
    def allocate(self, count: int) -> None:
        free = self.allocator.num_free
        pages = self.allocator.allocate(count)
        if count > free:
            assert pages is None
            return
        assert pages is not None
        assert len(set(pages)) == count
        for page in pages:
            assert page != DUMMY_PAGE
            assert all(page not in other for other in self.owned)
            self.content.pop(page, None)
        self.owned.append(pages)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.owned) - 1))
        self.allocator.release(self.owned.pop(index))

    @precondition(lambda self: any(self.owned))
    @rule(data=st.data(), name=st.integers(0, 4))
    def register(self, data: st.DataObject, name: int) -> None:
        pages = data.draw(st.sampled_from([pages for pages in self.owned if pages]))
        page = data.draw(st.sampled_from(pages))
        page_hash = bytes([name])
        self.allocator.register(page, page_hash)
        if page not in self.content and page_hash not in self.content.values():
            self.content[page] = page_hash

    @rule(name=st.integers(0, 4))
    def match_and_acquire(self, name: int) -> None:
        pages = self.allocator.match_prefix([bytes([name])])
        assert pages == [page for page, page_hash in self.content.items() if page_hash == bytes([name])]
        self.allocator.acquire(pages)
        self.owned.append(pages)

    @rule()
    def reset(self) -> None:
        in_use = any(self.owned)
        assert self.allocator.reset_prefix_cache() is not in_use
        if not in_use:
            self.content.clear()

    @invariant()
    def free_pages_are_those_without_owner(self) -> None:
        used = Counter(page for pages in self.owned for page in pages)
        assert self.allocator.num_free == NUM_PAGES - 1 - len(used)


AllocatorMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestAllocator = AllocatorMachine.TestCase


def test_least_recently_used_content_goes_first_and_the_head_of_a_prefix_last() -> None:
    allocator = PageAllocator(5, enable_prefix_caching=True)
    first = allocator.allocate(2)
    second = allocator.allocate(2)
    assert first is not None
    assert second is not None
    for page in first + second:
        allocator.register(page, bytes([page]))
    allocator.release(first)
    allocator.release(second)
    assert allocator.allocate(1) == [first[1]]
    assert allocator.allocate(1) == [first[0]]
    assert allocator.match_prefix([bytes([second[0]]), bytes([second[1]])]) == second


def test_pages_without_content_go_before_those_with() -> None:
    allocator = PageAllocator(4, enable_prefix_caching=True)
    pages = allocator.allocate(3)
    assert pages is not None
    allocator.register(pages[0], b"kept")
    allocator.release(pages)
    assert pages[0] not in (allocator.allocate(2) or [])


def test_disabled_prefix_caching_finds_nothing() -> None:
    allocator = PageAllocator(4, enable_prefix_caching=False)
    pages = allocator.allocate(1)
    assert pages is not None
    allocator.register(pages[0], b"x")
    assert allocator.match_prefix([b"x"]) == []


def test_releasing_twice_is_a_bug_that_shows() -> None:
    allocator = PageAllocator(4, enable_prefix_caching=True)
    pages = allocator.allocate(1)
    assert pages is not None
    allocator.release(pages)
    with pytest.raises(AssertionError, match="released twice"):
        allocator.release(pages)


def test_hashes_tell_tokens_parents_and_salts_apart() -> None:
    plain = hash_page(root_hash(None), [1, 2, 3])
    assert plain == hash_page(root_hash(None), [1, 2, 3])
    others = {
        hash_page(root_hash(None), [1, 2, 4]),
        hash_page(root_hash("salt"), [1, 2, 3]),
        hash_page(root_hash(""), [1, 2, 3]),
        hash_page(plain, [1, 2, 3]),
    }
    assert plain not in others
    assert len(others) == 4
