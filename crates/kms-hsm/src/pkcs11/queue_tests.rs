use super::*;

type Answer = oneshot::Receiver<Result<(), VaultError>>;

fn job() -> (Box<dyn Job>, Arc<Ticket>, Answer) {
    let (call, ticket, answer) = Call::new(|_: &Seat| Ok(()), None);
    (call, ticket, answer)
}

fn up(capacity: usize, crew: usize) -> Queue {
    let queue = Queue::new(capacity);
    queue.up(crew);
    queue
}

fn lost() -> VaultError {
    VaultError::Unavailable { cause: "lost".to_owned() }
}

#[test]
fn a_full_queue_is_busy_until_a_caller_leaves() {
    let queue = up(2, 1);
    let (one, _, first) = job();
    let (two, _, _second) = job();
    assert_eq!(queue.submit(one), Ok(()));
    assert_eq!(queue.submit(two), Ok(()));
    assert_eq!(queue.submit(job().0), Err(VaultError::Busy));
    drop(first);
    let (three, _, _third) = job();
    assert_eq!(queue.submit(three), Ok(()));
}

#[test]
fn a_job_that_nobody_waits_for_is_not_begun() {
    let queue = up(2, 1);
    let (left, _, answer) = job();
    queue.submit(left).unwrap();
    drop(answer);
    let (wanted, ticket, _answer) = job();
    queue.submit(wanted).unwrap();
    assert!(Arc::ptr_eq(queue.take().unwrap().ticket(), &ticket));
}

#[test]
fn a_job_is_tried_again_first_after_a_repair_but_not_for_ever() {
    let queue = up(2, 1);
    let (unlucky, ticket, mut answer) = job();
    let (next, _, _next) = job();
    queue.submit(unlucky).unwrap();
    queue.submit(next).unwrap();
    for _ in 0..RETRIES {
        let job = queue.take().unwrap();
        assert!(Arc::ptr_eq(job.ticket(), &ticket));
        queue.broken(Repair::Sessions, "lost", job);
        assert!(queue.take().is_none(), "this crew must leave");
        queue.up(1);
    }
    let job = queue.take().unwrap();
    queue.broken(Repair::Sessions, "lost", job);
    assert_eq!(answer.try_recv(), Ok(Err(lost())));
}

#[test]
fn requests_wait_for_the_first_repair_and_are_refused_during_the_next() {
    let queue = up(2, 2);
    let (first, _, _first) = job();
    queue.submit(first).unwrap();
    let job_at_work = queue.take().unwrap();
    queue.broken(Repair::Sessions, "closed", job_at_work);
    assert_eq!(queue.circuit(), Circuit::Repairing);
    assert_eq!(queue.phase(), Phase::Broken(Repair::Sessions, "closed".to_owned()));
    let (waiting, _, mut answer) = job();
    assert_eq!(queue.submit(waiting), Ok(()));
    queue.down(Phase::Down("lost".to_owned()));
    assert_eq!(answer.try_recv(), Ok(Err(lost())));
    assert_eq!(queue.submit(job().0), Err(lost()));
    queue.down(Phase::Refused("the PIN".to_owned()));
    assert_eq!(queue.submit(job().0), Err(VaultError::Credential("the PIN".to_owned())));
}

#[test]
fn the_deeper_repair_wins() {
    let queue = up(4, 2);
    let (one, _, _one) = job();
    let (two, _, _two) = job();
    queue.submit(one).unwrap();
    queue.submit(two).unwrap();
    let (one, two) = (queue.take().unwrap(), queue.take().unwrap());
    queue.broken(Repair::Device, "gone", one);
    queue.broken(Repair::Sessions, "closed", two);
    assert_eq!(queue.phase(), Phase::Broken(Repair::Device, "gone".to_owned()));
}

#[test]
fn a_crew_of_which_every_call_is_overdue_takes_no_more() {
    let queue = up(4, 2);
    let (one, first, _one) = job();
    let (two, second, _two) = job();
    queue.submit(one).unwrap();
    queue.submit(two).unwrap();
    let _running = (queue.take().unwrap(), queue.take().unwrap());
    first.expire();
    let (waiting, _, _answer) = job();
    assert_eq!(queue.submit(waiting), Ok(()), "one worker may still return");
    assert_eq!(queue.circuit(), Circuit::Closed);
    second.expire();
    assert!(matches!(queue.submit(job().0), Err(VaultError::Unavailable { .. })));
    assert_eq!(queue.circuit(), Circuit::Open);
    queue.done(&first);
    assert_eq!(queue.circuit(), Circuit::Closed);
    let (served, _, _answer) = job();
    assert_eq!(queue.submit(served), Ok(()));
}

#[test]
fn it_stands_still_while_only_calls_are_under_way_that_nobody_waits_for() {
    let queue = up(4, 2);
    assert_eq!(queue.standstill(), None);
    let (one, first, _one) = job();
    let (two, second, _two) = job();
    queue.submit(one).unwrap();
    queue.submit(two).unwrap();
    let _running = (queue.take().unwrap(), queue.take().unwrap());
    drop(Waiting(first.clone()));
    assert_eq!(queue.standstill(), None, "the second may still return");
    queue.done(&second);
    assert_eq!(queue.standstill(), Some(1));
    queue.done(&first);
    assert_eq!(queue.standstill(), None);
}

#[test]
fn a_closed_queue_stays_closed() {
    let queue = up(1, 1);
    queue.down(Phase::Closed);
    queue.up(1);
    assert!(queue.take().is_none());
    assert!(matches!(queue.submit(job().0), Err(VaultError::Unavailable { .. })));
}

/// A queue whose jobs of late were quick, in front of a crew that sleeps.
fn asleep(crew: usize) -> Queue {
    let queue = up(8, crew);
    for _ in 0..SURE {
        queue.state().pace.note(QUICK);
    }
    queue.state().asleep = crew;
    queue
}

fn submit(queue: &Queue) -> Arc<Ticket> {
    let (job, ticket) = Call::direct(|_: &Seat| Ok(()), Box::new(|_| ()));
    queue.submit(job).unwrap();
    ticket
}

/// As a worker that was woken and takes a job.
fn get_up(queue: &Queue) -> Box<dyn Job> {
    let mut state = queue.state();
    state.asleep -= 1;
    state.woken -= 1;
    drop(state);
    queue.take().unwrap()
}

/// How many sleep, and how many of them were woken.
fn sleepers(queue: &Queue) -> (usize, usize) {
    let state = queue.state();
    (state.asleep, state.woken)
}

#[test]
fn while_calls_are_quick_one_worker_is_woken_and_the_others_sleep_on() {
    let queue = asleep(3);
    let _waiting = [submit(&queue), submit(&queue)];
    assert_eq!(queue.state().woken, 1);
    let first = get_up(&queue);
    let _third = submit(&queue);
    assert_eq!(sleepers(&queue), (2, 0), "one is awake, and will be back");
    queue.done(first.ticket());
    assert!(queue.take().is_some());
    assert_eq!(sleepers(&queue), (2, 0));
}

#[test]
fn while_calls_take_long_every_request_wakes_a_worker() {
    let queue = asleep(3);
    for _ in 0..SURE {
        queue.state().pace.note(QUICK * 2);
    }
    let _waiting = [submit(&queue), submit(&queue), submit(&queue), submit(&queue)];
    assert_eq!(queue.state().woken, 3);
}

#[test]
fn a_call_that_takes_long_for_once_is_not_waited_for() {
    let queue = asleep(2);
    let _first = submit(&queue);
    let running = get_up(&queue);
    queue.state().at_work[0].since = Some(Duration::MAX);
    let _second = submit(&queue);
    assert_eq!(queue.state().woken, 0, "it has only begun");
    queue.state().at_work[0].since = Some(Duration::ZERO);
    assert!(!queue.state().wants_a_hand(QUICK));
    assert!(queue.state().wants_a_hand(QUICK * 2));
    drop(running);
}

#[test]
fn a_worker_that_does_not_come_back_is_replaced_by_a_nudge() {
    let queue = asleep(2);
    let _first = submit(&queue);
    let _hangs = get_up(&queue);
    let _second = submit(&queue);
    assert_eq!(queue.state().woken, 0);
    queue.nudge();
    assert_eq!(queue.state().woken, 1);
    queue.nudge();
    assert_eq!(queue.state().woken, 1, "there is no other");
    assert!(get_up(&queue).wanted());
}

#[test]
fn nobody_waits_for_the_end_of_a_job_that_makes_a_key() {
    let queue = asleep(2);
    let (slow, _, _answer) = job();
    queue.submit(slow).unwrap();
    let _making = get_up(&queue);
    let _brief = submit(&queue);
    assert_eq!(queue.state().woken, 1);
}

#[test]
fn a_direct_answer_is_given_once_and_to_nobody_who_has_left() {
    use std::sync::mpsc;
    let (heard, answers) = mpsc::channel();
    let direct = || {
        let heard = heard.clone();
        Call::direct(|_: &Seat| Ok(()), Box::new(move |answer| heard.send(answer).unwrap()))
    };
    let queue = up(1, 1);
    let (served, _ticket) = direct();
    queue.submit(served).unwrap();
    let (refused, _ticket) = direct();
    assert_eq!(queue.submit(refused), Err(VaultError::Busy));
    assert_eq!(answers.try_recv(), Ok(Err(VaultError::Busy)));
    let mut job = queue.take().unwrap();
    job.fail(VaultError::TimedOut);
    drop(job);
    assert_eq!(answers.try_recv(), Ok(Err(VaultError::TimedOut)));
    let (dropped, _ticket) = direct();
    drop(dropped);
    assert!(matches!(answers.try_recv(), Ok(Err(VaultError::Unavailable { .. }))));
    let (left, ticket) = direct();
    Waiting(ticket.clone()).leave(Duration::MAX);
    drop(left);
    assert!(answers.try_recv().is_err());
    assert!(!ticket.overdue.load(Ordering::Relaxed));
    let (_late, ticket) = direct();
    Waiting(ticket.clone()).leave(Duration::ZERO);
    assert!(ticket.overdue.load(Ordering::Relaxed));
}
