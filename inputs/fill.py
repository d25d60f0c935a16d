"""Group samples into packs with two budgets, tokens and tiles.

fill_packs: best fit with an age guard, for samples in random order; fill_in_order: one after the
other, for samples whose order is to be kept.
"""
import bisect
import itertools

# Samples that may wait for a pack they fit into.
WAITING = 64


def fill_packs(tokens, tiles, tokens_per_pack, tiles_per_pack):
    """Group samples in random order, none larger than a pack: a list of indices for each pack.

    A pack first takes the oldest of the WAITING samples, as long as more room stays than two
    average samples need. Then it takes the one or two of them that fill the rest best. So packs
    stay in nearly random order (sorted by length, a pack would hold samples of one kind), and no
    sample waits for more than WAITING packs, for each pack begins with the oldest.
    """
    if not tokens:
        return []
    packs = []
    arriving = iter(range(len(tokens)))
    waiting = list(itertools.islice(arriving, WAITING))
    two_samples = 2 * sum(tokens) // len(tokens)
    shortest = min(tokens)
    # A pack that is as full as this needs no further search.
    slack = tokens_per_pack // 4096
    while waiting:
        pack = []
        token_room = tokens_per_pack
        tile_room = tiles_per_pack
        chosen = oldest_samples(waiting, tokens, tiles, token_room, tile_room, two_samples)
        while chosen:
            for i in chosen:
                waiting.remove(i)
                token_room -= tokens[i]
                tile_room -= tiles[i]
            pack += chosen
            waiting += itertools.islice(arriving, WAITING - len(waiting))
            chosen = []
            if token_room >= shortest:
                chosen = best_fit(waiting, tokens, tiles, token_room, tile_room, slack)
        packs.append(pack)
    return packs


def oldest_samples(waiting, tokens, tiles, token_room, tile_room, reserve):
    """The oldest waiting samples that fit, as long as `reserve` tokens of room remain."""
    chosen = []
    for i in waiting:
        if chosen and token_room - tokens[i] < reserve:
            break
        if tokens[i] <= token_room and tiles[i] <= tile_room:
            chosen.append(i)
            token_room -= tokens[i]
            tile_room -= tiles[i]
    return chosen


def best_fit(waiting, tokens, tiles, token_room, tile_room, slack):
    """The one or two waiting samples that fill the room best, or [] if none fits.

    Among equally good choices the one with the larger indices wins.
    """
    # `waiting` is in order of arrival, and sorting keeps that order among equal lengths.
    by_length = sorted(waiting, key=tokens.__getitem__)
    lengths = [tokens[i] for i in by_length]
    n_fitting = bisect.bisect(lengths, token_room)
    best = []
    best_total = 0
    # The longest single sample that fits.
    for i in by_length[n_fitting - 1::-1] if n_fitting else ():
        if tiles[i] <= tile_room:
            best = [i]
            best_total = tokens[i]
            break
    # Pairs: one pointer at the shortest, one at the longest, moving towards each other.
    low = 0
    high = n_fitting - 1
    while low < high and best_total <= token_room - slack:
        total = lengths[low] + lengths[high]
        if total > token_room:
            high -= 1
            continue
        if total >= best_total:
            a = by_length[low]
            b = by_length[high]
            better = total > best_total or a + b > sum(best)
            if better and tiles[a] + tiles[b] <= tile_room:
                best = [a, b]
                best_total = total
        low += 1
    return best


def fill_in_order(tokens, tiles, tokens_per_pack, tiles_per_pack):
    """Group samples, none larger than a pack, as they come: a list of indices for each pack.

    A pack ends where the next sample does not fit, so it is less full than one of fill_packs.
    """
    packs = []
    token_room = 0
    tile_room = 0
    for i, (n_tokens, n_tiles) in enumerate(zip(tokens, tiles, strict=True)):
        if not packs or n_tokens > token_room or n_tiles > tile_room:
            packs.append([])
            token_room = tokens_per_pack
            tile_room = tiles_per_pack
        packs[-1].append(i)
        token_room -= n_tokens
        tile_room -= n_tiles
    return packs
