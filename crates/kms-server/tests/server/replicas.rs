//! Three servers, each a process with an HSM session of its own, in front of one token and one database.
//!
//! A key's name is no identity in Key Protect: two creators of one name get two keys, each with its own id, and a client
//! that wants one asks for it by id or alias. So what must hold of a hundred creators of one name is that there are a
//! hundred keys afterwards, and that what was wrapped with each of them meanwhile, on whichever server, opens on every one.

use crate::harness::crowd;
use crate::harness::rig::{Client, Rig};
use std::collections::BTreeSet;
use std::sync::Arc;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;

const PLAINTEXT: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";
const CREATORS: usize = 100;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s1_a_hundred_creators_on_three_replicas_get_a_hundred_keys_and_every_one_opens_everywhere()
{
    let Some(first) = Rig::make() else { return };
    let mut rigs = [first.replica("second"), first.replica("third"), first];
    let mut clients = Vec::new();
    for rig in &mut rigs {
        rig.start().await;
        clients.push(rig.admin().await);
    }
    let began = Instant::now();
    let mut made = vec![create_and_use(clients[0].clone(), clients[1].clone()).await];
    // It takes four turns at the database.
    let turns = Arc::new(Semaphore::new(crowd(began.elapsed() / 4)));
    let creators: Vec<_> = (1..CREATORS)
        .map(|creator| {
            let here = clients[creator % 3].clone();
            let (there, turns) = (clients[(creator + 1) % 3].clone(), turns.clone());
            tokio::spawn(async move {
                let _turn = turns.acquire().await.unwrap();
                create_and_use(here, there).await
            })
        })
        .collect();
    for creator in creators {
        let done = creator.await;
        made.push(done.unwrap_or_else(|e| panic!("{e}\n{}", logs(&rigs))));
    }
    let ids: BTreeSet<&String> = made.iter().map(|(id, _)| id).collect();
    assert_eq!(ids.len(), CREATORS, "no id is given twice");
    for client in &clients {
        for (id, wdeks) in &made {
            for wdek in wdeks {
                let opened = client.unwrap(id, wdek).await.unwrap();
                assert_eq!(opened.status, 200, "{opened:?}\n{}", logs(&rigs));
                assert_eq!(opened.json()["plaintext"], PLAINTEXT);
            }
        }
    }
    for rig in &mut rigs {
        rig.kill();
    }
    let (code, found) = rigs[0].check();
    assert_eq!(code, 0, "no half key, none lost: {found}");
    assert_eq!(found["keys"].as_array().unwrap().len(), 2 * CREATORS, "each was rotated once");
}

/// A key's first minutes: made on one server, used at once on another, rotated there, used on both.
async fn create_and_use(here: Client, there: Client) -> (String, Vec<String>) {
    let id = here.create("one name").await.unwrap();
    let mut wdeks = vec![wrap(&here, &id).await, wrap(&there, &id).await];
    let rotated = there.call("POST", &format!("/{id}/actions/rotate"), "").await.unwrap();
    assert_eq!(rotated.status, 204, "{rotated:?}");
    wdeks.extend([wrap(&here, &id).await, wrap(&there, &id).await]);
    (id, wdeks)
}

async fn wrap(client: &Client, id: &str) -> String {
    let wrapped = client.wrap(id, PLAINTEXT).await.unwrap();
    assert_eq!(wrapped.status, 200, "{wrapped:?}");
    wrapped.json()["ciphertext"].as_str().unwrap().to_owned()
}

fn logs(rigs: &[Rig]) -> String {
    rigs.iter().map(Rig::log).collect::<Vec<_>>().join("\n")
}

/// What must be answered to a use that begins now: anything while a change is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    Either,
    Only(u16),
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s3_what_one_replica_disables_a_busy_other_refuses_from_the_next_request_on() {
    let Some(mut first) = Rig::make() else { return };
    let mut second = first.replica("second");
    first.start().await;
    second.start().await;
    let (here, there) = (first.admin().await, second.admin().await);
    let id = here.create("hot").await.unwrap();
    let (expected, watched) = watch::channel(Expected::Only(200));
    let (told, mut answers) = mpsc::unbounded_channel();
    for _ in 0..4 {
        let (there, id, expected, told) =
            (there.clone(), id.clone(), watched.clone(), told.clone());
        tokio::spawn(async move {
            loop {
                let before = *expected.borrow();
                let status = there.wrap(&id, PLAINTEXT).await.unwrap().status;
                if told.send((before, *expected.borrow(), status)).is_err() {
                    return;
                }
            }
        });
    }
    for (action, status) in [("disable", 409), ("enable", 200)].into_iter().cycle().take(40) {
        expected.send_replace(Expected::Either);
        let done = here.call("POST", &format!("/{id}/actions/{action}"), "").await.unwrap();
        assert_eq!(done.status, 204, "{done:?}");
        expected.send_replace(Expected::Only(status));
        let mut uses = 0;
        while uses < 20 {
            let (before, after, found) = answers.recv().await.unwrap();
            // A use that began before the change and ended after it may have either answer.
            if before == after && before != Expected::Either {
                assert_eq!(before, Expected::Only(found), "{}", second.log());
                uses += u32::from(found == status);
            }
        }
    }
}
