// Flights: who takes part, whose beginning is shared, which pieces of work fit, and the draws.
#include "scheduler.h"

#include <algorithm>

namespace tinyllama {
namespace {

// Of what is left of a budget, at most this much is spent before the clock is looked at again.
constexpr double part_at_once = 0.5;
// A pass of which any piece costs more than this much of a whole step's budget has too many rows.
constexpr double largest_piece = 0.25;
// What reading prompts may add to a pass of those who speak, in passes of theirs.
constexpr double patience = 1.0;
// A common beginning is worth waiting for if it spares so many tokens.
constexpr std::size_t least_shared = 16;

}  // namespace

// What a pass over so many rows, all of which ask for logits, is thought to cost, and the dearest
// piece of it.
Scheduler::Foreseen Scheduler::foresee(std::int64_t n_rows, std::int64_t n_positions) const {
    Foreseen cost{};
    for (const Work::Kind kind :
         {Work::Kind::attention, Work::Kind::feed_forward, Work::Kind::output}) {
        const Seconds piece = costs_.estimate(pass_->piece(kind, n_rows, n_positions));
        cost.pass += static_cast<double>(pass_->n_pieces(kind)) * piece;
        cost.dearest_piece = std::max(cost.dearest_piece, piece);
    }
    return cost;
}

void Scheduler::doubt(std::int64_t n_rows, std::int64_t n_positions) {
    for (const Work::Kind kind :
         {Work::Kind::attention, Work::Kind::feed_forward, Work::Kind::output})
        costs_.doubt(pass_->piece(kind, n_rows, n_positions));
}

bool Scheduler::begin_flight(Budget& budget) {
    abandon();
    ++turn_;
    bool elected = false;
    try {
        choose(budget);
        elected = hold_elections(budget);
        if (!rows_.empty()) pass_->begin(rows_);
    } catch (...) {
        abandon();
        throw;
    }
    flying_ = !parts_.empty() || !drawing_.empty();
    return flying_ || elected;
}

// Whoever has to choose among texts, and has a place, goes on with that. True when something was
// done.
bool Scheduler::hold_elections(Budget& budget) {
    live_.erase(std::remove_if(live_.begin(), live_.end(),
                               [](const auto& request) {
                                   return request->is_scout_ && request->ending_ != Ending::none;
                               }),
                live_.end());
    const Work election{Work::Kind::elect, 1, 1};
    bool any = false;
    for (const auto& request : live_) {
        if (request->election_ == nullptr || request->last_turn_ == 0 || !goes_on(*request))
            continue;
        if (!request->election_->can_go_on(*request->session_)) continue;
        if (costs_.estimate(election) > budget.left()) {
            if (budget.untouched) costs_.doubt(election);
            break;
        }
        const Clock::time_point start = Clock::now();
        go_on_electing(request);
        pieces_.assign(1, election);
        worked(Clock::now() - start);
        budget.untouched = false;
        any = true;
    }
    live_.insert(live_.end(), scouts_.begin(), scouts_.end());
    scouts_.clear();
    return any;
}

void Scheduler::go_on_electing(const std::shared_ptr<Request>& request) {
    const std::size_t n_before = scouts_.size();
    std::exception_ptr error;
    try {
        if (request->make_room_for_election() &&
            request->election_->can_go_on(*request->session_)) {
            request->election_->go_on(*request, &scouts_);
            if (request->election_->is_over()) request->elect();
        }
    } catch (...) {
        error = std::current_exception();
    }
    for (std::size_t i = n_before; i < scouts_.size(); ++i) {
        scouts_[i]->id_ = ++n_submitted_;
        scouts_[i]->elector_ = request;
        if (scouts_[i]->ending_ == Ending::none) scouts_[i]->source_ = request;
    }
    if (error != nullptr) {
        fail(request, error);
        return;
    }
    report(request);
    if (request->ending_ != Ending::none) announce(request);
}

// Whatever the flight had read is read again.
void Scheduler::abandon() {
    for (const Part& part : parts_)
        leave(*part.request);
    parts_.clear();
    rows_.clear();
    order_.clear();
    drawing_.clear();
    n_drawn_ = 0;
    flying_ = false;
}

void Scheduler::leave(const Request& request) {
    if (request.ending_ == Ending::none && request.session_->pass_ == pass_.get())
        request.session_->leave_pass();
}

// Who takes part in a flight: those who speak, one row each, then prompts, as much of them as does
// not keep the speakers waiting.
void Scheduler::choose(Budget& budget) {
    order_.clear();
    std::int64_t places = max_live_;
    for (const auto& request : live_) {
        if (request->ending_ != Ending::none) continue;
        if (request->last_turn_ > 0 && !request->is_scout_) --places;
        if (goes_on(*request)) order_.push_back(request);
    }
    std::sort(order_.begin(), order_.end(), [](const auto& a, const auto& b) {
        const Urgency &x = a->urgency_, &y = b->urgency_;
        if (x.priority != y.priority) return x.priority > y.priority;
        if (x.deadline != y.deadline) return x.deadline < y.deadline;
        return a->last_turn_ != b->last_turn_ ? a->last_turn_ < b->last_turn_ : a->id_ < b->id_;
    });
    order_.erase(std::remove_if(order_.begin(), order_.end(),
                                [&](const auto& request) {
                                    return request->last_turn_ == 0 && !request->is_scout_ &&
                                           places-- <= 0;
                                }),
                 order_.end());
    for (const auto& request : order_)
        request->admitted_ = turn_;
    const auto largest = static_cast<std::int64_t>(max_rows);
    std::int64_t room = largest, n_positions = 0, n_tokens = 0;
    for (const auto& request : order_)
        n_tokens += request->session_->n_tokens();
    if (budget.limited() && !order_.empty()) {
        const std::int64_t usual = n_tokens / static_cast<std::int64_t>(order_.size());
        for (room = 1; room < largest; room *= 2) {
            const Foreseen cost = foresee(2 * room, 2 * room * usual);
            if (cost.dearest_piece <= largest_piece * budget.whole) continue;
            if (room < static_cast<std::int64_t>(order_.size())) doubt(2 * room, 2 * room * usual);
            break;
        }
    }
    // A row is kept for the prompt whose turn it is.
    const std::int64_t kept = !order_.empty() && order_.front()->session_->n_unread() > 1 ? 1 : 0;
    for (const auto& request : order_) {
        const std::int64_t n_unread = request->session_->n_unread();
        if (n_unread <= 1) request->source_ = nullptr;
        if (n_unread == 0) {
            request->last_turn_ = turn_;
            if (may_draw(*request)) drawing_.push_back(request);
        } else if (n_unread == 1 && room > kept) {
            n_positions += request->session_->n_tokens();
            room -= take(request, 1);
        }
    }
    const auto n_speaking = static_cast<std::int64_t>(rows_.size());
    if (budget.limited() && n_speaking > 0) {
        const Seconds speaking = foresee(n_speaking, n_positions).pass;
        const Seconds most = std::max((1 + patience) * speaking, budget.whole);
        while (room > 1 && foresee(n_speaking + room, n_positions).pass > most)
            room /= 2;
    }
    for (const auto& request : order_) {
        if (room == 0) break;
        if (request->last_turn_ == turn_) continue;  // it has its part
        const std::shared_ptr<Request> reader = find_reader(request, budget);
        if (reader == nullptr || reader->last_turn_ == turn_) continue;
        room -= take(reader, std::min<std::int64_t>(reader->session_->n_unread(), room));
    }
    order_.clear();
}

// Who else has the longest beginning in common with a request, and has read it, or will before.
std::shared_ptr<Request> Scheduler::find_source(const Request& request) {
    std::shared_ptr<Request> found;
    const SessionLock lock(*request.session_);
    std::size_t longest = request.session_->n_read_ + least_shared - 1;
    for (const auto& weak : known_) {
        const std::shared_ptr<Request> other = weak.lock();
        if (other == nullptr || other->session_ == request.session_) continue;
        if (alone_ && other->ending_ != Ending::none) continue;
        const SessionGlance others(*other->session_);
        if (!others.owns()) continue;
        std::size_t n = request.session_->n_in_common_with(*other->session_);
        if (!goes_on(*other) || other->id_ > request.id_) n = std::min(n, other->session_->n_read_);
        if (n <= longest) continue;
        longest = n;
        found = other;
    }
    return found;
}

// Who is to read now, so that a request goes on: itself, unless another is about to read the same
// beginning. Nobody, where there is no time left to share what was read.
std::shared_ptr<Request> Scheduler::find_reader(const std::shared_ptr<Request>& request,
                                                Budget& budget) {
    std::shared_ptr<Request> reader = request;
    while (reader->source_ != nullptr) {
        const std::shared_ptr<Request> source = reader->source_;
        if (!share_beginning(*reader, budget)) return nullptr;
        if (reader->source_ == source) reader = source;
    }
    return reader;
}

// Shares what a request's source has read, and finds it another where that will not read the rest.
// False: there is no time for that now.
bool Scheduler::share_beginning(Request& request, Budget& budget) {
    const std::shared_ptr<Request> source = request.source_;
    {
        Session &session = *request.session_, &other = *source->session_;
        const SessionLock lock(session);
        const SessionGlance others(other);
        const std::size_t common = others.owns() ? session.n_in_common_with(other) : 0;
        if (common > other.n_read_ && is_waited_for(*source, request)) return true;
        std::size_t n = std::min(common, other.n_read_);
        const bool all = n == common;
        const Work copy{Work::Kind::copy, 1, 1};
        Seconds cost = n % kv_block == 0 ? Seconds{0} : costs_.estimate(copy);
        const bool too_dear = cost > largest_piece * budget.whole;
        if (too_dear) {
            costs_.doubt(copy);
            n -= n % kv_block;  // the rest is read instead
            cost = Seconds{0};
        }
        if (n >= session.n_read_ + least_shared) {
            if (budget.limited() && cost > budget.left()) return false;
            const Clock::time_point start = Clock::now();
            stats_.n_shared += static_cast<std::int64_t>(n - session.n_read_);
            session.share_beginning(other, n);
            if (n % kv_block != 0) {
                pieces_.assign(1, copy);
                costs_.learn(pieces_, Clock::now() - start);
            }
            budget.untouched = false;
        }
        request.source_ = nullptr;
        if (all || too_dear || goes_on(*source)) return true;
    }
    request.source_ = find_source(request);
    return true;
}

// One that was submitted before and has its place: so nobody waits for himself, nor for a place.
bool Scheduler::is_waited_for(const Request& source, const Request& request) const {
    return goes_on(source) && source.id_ < request.id_ && source.admitted_ == turn_;
}

// Gives a request n rows; returns how many it has got. One that cannot have them ends.
std::int64_t Scheduler::take(const std::shared_ptr<Request>& request, std::int64_t n) {
    Session& session = *request->session_;
    const std::size_t n_rows = rows_.size();
    try {
        const SessionLock lock(session);
        session.leave_pass();  // of another scheduler
        session.add_rows(static_cast<std::size_t>(n), &rows_);
        session.pass_ = pass_.get();
    } catch (...) {
        rows_.resize(n_rows);
        fail(request, std::current_exception());
        return 0;
    }
    request->last_turn_ = turn_;
    parts_.push_back({request, static_cast<std::size_t>(n)});
    return n;
}

// Chooses the next pieces of the pass: as many as surely fit. A piece of which nothing is known is
// tried alone.
void Scheduler::plan(Budget& budget) {
    pieces_.clear();
    const Seconds left = budget.left();
    Seconds foreseen{0};
    for (std::int64_t i = 0; left > Seconds{0} && i < pass_->n_left(); ++i) {
        const Work next = pass_->next(i);
        const Seconds cost = costs_.estimate(next);
        const bool known = cost > Seconds{0} || next.amount == 0 || !budget.limited();
        if (i > 0 && !known) break;
        foreseen += cost;
        if (foreseen > (i == 0 ? 1.0 : part_at_once) * left) {
            if (i == 0 && budget.untouched) costs_.doubt(next);
            break;
        }
        pieces_.push_back(next);
        if (!known) break;
    }
}

// The chosen pieces, with their sessions locked.
void Scheduler::advance() {
    struct Unlock {
        std::vector<SessionLock>& locks;
        ~Unlock() { locks.clear(); }
    } const unlock{locks_};
    for (const Part& part : parts_) {
        if (takes_part(part)) locks_.emplace_back(*part.request->session_);
    }
    const Clock::time_point start = Clock::now();
    pass_->advance(static_cast<std::int64_t>(pieces_.size()));
    worked(Clock::now() - start);
}

// Goes on with the pass, and with its end takes in what was read. False: no time for its next
// piece.
bool Scheduler::fly(Budget& budget, const Check& check) {
    while (!parts_.empty() && pass_->n_left() > 0) {
        plan(budget);
        if (pieces_.empty()) return false;
        advance();
        budget.untouched = false;
        check();
        obey();
    }
    for (const Part& part : parts_) {
        if (!takes_part(part)) continue;  // it left: all is read again
        Session& session = *part.request->session_;
        const SessionGlance lock(session);
        if (!lock.owns()) continue;  // somebody is at it: likewise
        session.pass_ = nullptr;
        session.has_read(part.n_rows);
        stats_.n_read += static_cast<std::int64_t>(part.n_rows);
        if (session.unread() > 0) continue;
        try {
            if (!pass_->all_finite()) session.refuse_nonfinite_logits();
            drawing_.push_back(part.request);
        } catch (...) {
            fail(part.request, std::current_exception());
        }
    }
    parts_.clear();
    return true;
}

// The session of a request that has ended is no longer ours to look at.
bool Scheduler::takes_part(const Part& part) const {
    return part.request->ending_ == Ending::none && part.request->session_->pass_ == pass_.get();
}

void Scheduler::worked(Seconds elapsed) {
    costs_.learn(pieces_, elapsed);
    stats_.n_pieces += static_cast<std::int64_t>(pieces_.size());
    stats_.spent += elapsed;
}

// Draws for all who have read everything, and ends the flight. False: no time for the next draws.
bool Scheduler::draw(Budget& budget, const Check& check) {
    drop_undrawable();
    while (n_drawn_ < drawing_.size()) {
        auto n = static_cast<std::int64_t>(drawing_.size() - n_drawn_);
        const Seconds left = budget.left();
        while (n > 0 && costs_.estimate({Work::Kind::draw, n, n}) > left)
            n /= 2;
        if (n == 0 || left <= Seconds{0}) {
            if (left > Seconds{0} && budget.untouched) costs_.doubt({Work::Kind::draw, 1, 1});
            return false;
        }
        const Clock::time_point start = Clock::now();
        draws_.clear();
        const std::size_t begin = n_drawn_;
        for (n_drawn_ += static_cast<std::size_t>(n); draws_.size() < static_cast<std::size_t>(n);)
            draws_.push_back(drawing_[begin + draws_.size()]->next_draw());
        events_.reserve(events_.size() + 2 * static_cast<std::size_t>(n));
        draw_each(draws_);
        for (std::size_t i = 0; i < draws_.size(); ++i)
            take_in(drawing_[begin + i], draws_[i]);
        pieces_.assign(1, {Work::Kind::draw, n, n});
        worked(Clock::now() - start);
        budget.untouched = false;
        check();
        obey();
        drop_undrawable();
    }
    drawing_.clear();
    flying_ = false;
    return true;
}

void Scheduler::drop_undrawable() {
    const auto first = drawing_.begin() + static_cast<std::ptrdiff_t>(n_drawn_);
    drawing_.erase(std::remove_if(first, drawing_.end(),
                                  [&](const auto& request) { return !may_draw(*request); }),
                   drawing_.end());
}

// It may have ended, been paused, or got more to read since it was chosen.
bool Scheduler::may_draw(const Request& request) {
    return goes_on(request) && request.election_ == nullptr && request.session_->n_unread() == 0;
}

void Scheduler::take_in(const std::shared_ptr<Request>& request, const Draw& drawn) {
    if (drawn.error != nullptr) {
        fail(request, drawn.error);
        return;
    }
    std::exception_ptr error;
    try {
        request->accept(drawn.token);
    } catch (...) {
        error = std::current_exception();
    }
    if (error != nullptr) {
        fail(request, error);
        return;
    }
    report(request);
    if (request->ending_ != Ending::none) announce(request);
}

}  // namespace tinyllama
