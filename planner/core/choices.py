"""The policy's choice for a task: asked for, converted, and checked against the task's caps and the ledger.

The check also covers the built-in policies, so that a bug in one of them never enters the state.
"""

from __future__ import annotations

import math
from operator import index

from bus.errors import InvariantError, PolicyError
from bus.values import MAX_ROUTES
from planner.core.region.records import NEVER
from planner.search.algorithm1 import Algorithm
from planner.search.codec_search import CodecSearch, PathSearch
from planner.search.cost import RAW
from planner.search.families import family_of
from planner.search.placements import Choice
from planner.search.policies import Policy, Restriction
from planner.search.request import EdgeOption, Request
from planner.search.route_search import MixedRoute


def ask(policy: Policy, algorithm: Algorithm) -> Choice | None:
    """The policy's choice, in Python's own numbers. None: no placement is possible."""
    choice = policy.place(algorithm)
    return choice if choice is None or isinstance(policy, Restriction) else _normalized(choice)


def _normalized(choice: Choice) -> Choice:
    """The choice of a user's policy, converted to Python's int and float. Raises `PolicyError` for anything else."""
    try:
        family, edge, cut1, cut2, link1_bps, link2_bps, start_s, delay_s, given = choice
        whole = (index(cut1), index(cut2), index(link1_bps), index(link2_bps))
        routes = tuple(MixedRoute(index(one), index(two), float(share), codecs) for one, two, share, codecs in given)
        return Choice(index(family), edge, *whole, float(start_s), float(delay_s), routes)
    except (TypeError, ValueError) as error:
        raise PolicyError(f"it chose {choice!r:.200}, which is not a Choice: {error}") from None


def _consistent(choice: Choice, layers: int) -> bool:
    """Whether the routes of a choice are possible, and its cuts are those of its largest route beyond the device."""
    routes = choice.routes
    beyond = [route for route in routes if route.cut1 < layers]
    return (
        len(routes) <= MAX_ROUTES
        and all(0 <= route.cut1 <= route.cut2 <= layers and route.share > 0 for route in routes)
        and math.isclose(sum(route.share for route in routes), 1.0, abs_tol=1e-6)
        and any(
            route[:2] == (choice.cut1, choice.cut2) and route.share == max(one.share for one in beyond)
            for route in beyond
        )
    )


def _may_use(request: Request, search: PathSearch, route: MixedRoute) -> bool:
    """Whether the codecs of a route are measured at its cuts, and agree enough for the task."""
    own_input = request.input_bytes not in (None, search.costs.cut_bytes[0])
    return isinstance(search, CodecSearch) and route.codecs in search.codecs_at(
        route.cut1, route.cut2, own_input=own_input
    )


def _possible(request: Request, option: EdgeOption | None, cut1: int, cut2: int, link2_bps: int) -> bool:
    """Whether a task may be cut so: its tiers allow it, the tiers run the model, and a link that is used has bandwidth."""
    layers = request.device_row.layers
    if family_of(cut1, cut2, layers) not in request.families or (cut1 > 0 and not request.device_computes):
        return False
    if option is None:
        return True
    costs, forbidden = option.search.costs, option.search.forbidden
    return (
        cut1 not in forbidden
        and cut2 not in forbidden
        and (cut1 == cut2 or costs.edge is not None)
        and (cut2 == layers or (costs.cloud is not None and link2_bps >= 1))
    )


def check_choice(policy: Policy, request: Request, option: EdgeOption | None, choice: Choice, now: float) -> None:
    """Check that a choice is consistent, within the task's caps (11) and tiers, and free in the ledger.

    Raises `PolicyError` for a user's policy, and `InvariantError` for a built-in one.
    """
    end, layers = choice.start_s + choice.delay_s, request.device_row.layers
    good = (
        now <= choice.start_s <= end < NEVER
        and 0 <= choice.cut1 <= choice.cut2 <= layers
        and (not choice.routes or _consistent(choice, layers))
        and (choice.edge is None) == (option is None) == (choice.cut1 == layers)
    )
    if good and option is not None:
        good = (
            choice.start_s >= option.account.turn_s()
            and 1 <= choice.link1_bps <= option.max_link1_bps
            and 0 <= choice.link2_bps <= option.max_link2_bps
            and option.account.timeline.fits(
                choice.start_s, end, int(choice.uses_slot), choice.link1_bps, choice.link2_bps
            )
        )
    if good and request.device is not None:
        good = request.device.timeline.fits(choice.start_s, end, int(choice.uses_device), choice.link1_bps, 0)
    for cut1, cut2 in choice.cut_pairs:
        good = good and _possible(request, option, cut1, cut2, choice.link2_bps)
    for route in choice.routes:
        good = good and (route.codecs == RAW or (option is not None and _may_use(request, option.search, route)))
    if not good:
        fault = f"it chose for {request.task_id} what cannot be, or is not free: {choice!r:.300}"
        if isinstance(policy, Restriction):
            raise InvariantError(f"policy {policy.name}: {fault}")
        raise PolicyError(fault)
