//! Sequences of calls on two connected sockets, by a fiber and a second one beside it, against a model of the two streams: each byte
//! that was taken comes out once, in order; and nothing panics, hangs or leaves a descriptor.
//!
//! The sockets and the ring are the kernel's, so an execution takes as long as its timeouts: 100 to 2,000 a second. `socket_calls` is
//! the target for many.
//!
//! The first byte chooses the pair (TCP or Unix) and the mode; then two bytes a call: which, and how much.
#![no_main]

#[path = "../asan_options.rs"]
mod asan_options;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::OnceLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use ringsock::prelude::*;
use ringsock::{Runtime, create_server, sleep, socketpair, spawn, timeout, yield_now};

fuzz_target!(|data: &[u8]| {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    let runtime = RUNTIME.get_or_init(|| Runtime::builder().build().expect("a ring"));
    let before = sockets();
    let data = data.to_vec();
    let played = runtime.handle().spawn(move || play(&data)).unwrap().join();
    played.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(sockets(), before, "a descriptor was not given back");
});

/// How many sockets are open among the first descriptors. (libfuzzer opens and closes files of its own.)
fn sockets() -> usize {
    let is_socket = |fd: &i32| {
        // SAFETY: a stat of zeros is a valid one, which the kernel fills in.
        unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            libc::fstat(*fd, &mut stat) == 0 && stat.st_mode & libc::S_IFMT == libc::S_IFSOCK
        }
    };
    (0..64).filter(is_socket).count()
}

/// One way of the connection, as it has to be.
#[derive(Default)]
struct Stream {
    /// What was taken and has not come out.
    under_way: VecDeque<u8>,
    next: u8,
}

impl Stream {
    fn bytes(&self, count: usize) -> Vec<u8> {
        (0..count)
            .map(|n| self.next.wrapping_add(n as u8))
            .collect()
    }

    fn sent(&mut self, count: usize) {
        for _ in 0..count {
            self.under_way.push_back(self.next);
            self.next = self.next.wrapping_add(1);
        }
    }

    fn received(&mut self, bytes: &[u8]) {
        for byte in bytes {
            assert_eq!(
                self.under_way.pop_front(),
                Some(*byte),
                "lost, doubled or invented"
            );
        }
    }
}

fn pair(choice: u8) -> (Socket, Socket) {
    if choice & 1 == 0 {
        return socketpair().unwrap();
    }
    let server = create_server(("127.0.0.1", 0)).unwrap();
    let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
    client.connect(server.getsockname().unwrap()).unwrap();
    // A reset at the end leaves no TIME_WAIT behind, of which there would soon be too many.
    let linger: Vec<u8> = [1i32, 0].iter().flat_map(|n| n.to_ne_bytes()).collect();
    client
        .setsockopt(SOL_SOCKET, SO_LINGER, &linger[..])
        .unwrap();
    (client, server.accept().unwrap().0)
}

fn is_expected(error: &Error) -> bool {
    let errno = error.errno();
    *error == Error::Timeout
        || error.is_would_block()
        || error.is_closed()
        || matches!(
            errno,
            Some(libc::EPIPE | libc::ECONNRESET | libc::ENOTCONN | libc::EINVAL)
        )
}

fn play(data: &[u8]) {
    let Some((choice, calls)) = data.split_first() else {
        return;
    };
    let (left, right) = pair(*choice);
    let ends = [left, right];
    let short = Duration::from_micros(50);
    for end in &ends {
        match choice >> 1 & 1 {
            0 => end.settimeout(short).unwrap(),
            _ => end.setblocking(false).unwrap(),
        }
    }
    // streams[n] is what ends[n] sends.
    let streams: [Rc<RefCell<Stream>>; 2] = Default::default();
    for call in calls.chunks_exact(2).take(64) {
        let which = usize::from(call[0] >> 7);
        let (end, sends, gets) = (&ends[which], &streams[which], &streams[1 - which]);
        let count = usize::from(call[1]);
        let mut buffer = [0; 256];
        let result = match call[0] & 0x1f {
            0..6 => {
                let bytes = sends.borrow().bytes(count);
                end.send(&bytes).map(|sent| sends.borrow_mut().sent(sent))
            }
            6 | 7 => {
                let bytes = sends.borrow().bytes(count);
                // So little always fits, unless the other end is gone.
                end.sendall(&bytes).map(|()| sends.borrow_mut().sent(count))
            }
            8..12 => end
                .recv_into(&mut buffer[..count])
                .map(|n| gets.borrow_mut().received(&buffer[..n])),
            12..14 => end.recv(count).map(|got| gets.borrow_mut().received(&got)),
            14 => end.recv_with(count, MSG_PEEK).map(|got| {
                assert!(
                    gets.borrow()
                        .under_way
                        .iter()
                        .zip(got.iter())
                        .all(|(a, b)| a == b)
                );
            }),
            15 => end
                .recv_with(count, MSG_WAITALL)
                .map(|got| gets.borrow_mut().received(&got)),
            16 => end
                .recv_with(count, MSG_DONTWAIT)
                .map(|got| gets.borrow_mut().received(&got)),
            17 => timeout(short, || end.recv(count)).map(|got| gets.borrow_mut().received(&got)),
            18 => {
                // A receive that is cancelled, perhaps just when data comes.
                let (end, gets) = (end.clone(), gets.clone());
                let fiber =
                    spawn(move || end.recv(count).map(|got| gets.borrow_mut().received(&got)));
                yield_now();
                fiber.cancel();
                match fiber.join().unwrap() {
                    Err(Error::Cancelled) => Ok(()),
                    other => other,
                }
            }
            19 => {
                // A receive beside this fiber, which sends to it.
                let (end, gets) = (end.clone(), gets.clone());
                let fiber =
                    spawn(move || end.recv(256).map(|got| gets.borrow_mut().received(&got)));
                let other = &ends[1 - which];
                let bytes = streams[1 - which].borrow().bytes(count);
                let sent = other.send(&bytes);
                // Known before the other fiber runs, since nothing waits in between.
                if let Ok(sent) = sent {
                    streams[1 - which].borrow_mut().sent(sent);
                }
                fiber.join().unwrap().and(sent.map(drop))
            }
            20 => end.shutdown(i32::from(call[1] % 4)),
            21 => end.close(),
            22 => end.dup().map(drop),
            23 => end.settimeout(Duration::from_micros(count as u64)),
            24 => end.setsockopt(SOL_SOCKET, SO_SNDBUF, count as i32 * 64),
            25 => end.getsockname().and_then(|_| end.getpeername()).map(drop),
            26 => {
                let mut chunks = end.chunks();
                let result = match chunks.next() {
                    Some(Ok(chunk)) => {
                        gets.borrow_mut().received(&chunk);
                        Ok(())
                    }
                    Some(Err(error)) => Err(error),
                    None => Ok(()),
                };
                drop(chunks);
                result
            }
            27 => {
                // Closed while another fiber receives.
                let reader = end.clone();
                let gets = gets.clone();
                let fiber =
                    spawn(move || reader.recv(16).map(|got| gets.borrow_mut().received(&got)));
                yield_now();
                end.close().unwrap();
                fiber.join().unwrap()
            }
            28 => {
                let _ = format!("{end:?} {} {:?}", end.fileno(), end.gettimeout());
                Ok(())
            }
            29 => sleep(Duration::from_micros(10)),
            30 => {
                let mut parts = buffer
                    .chunks_mut(100)
                    .map(std::io::IoSliceMut::new)
                    .collect::<Vec<_>>();
                let result = end.recvmsg_into(&mut parts);
                drop(parts);
                result.map(|message| gets.borrow_mut().received(&buffer[..message.nbytes]))
            }
            _ => {
                let bytes = sends.borrow().bytes(count);
                let (one, two) = bytes.split_at(count / 2);
                let parts = [one, two].map(std::io::IoSlice::new);
                end.sendmsg(&parts)
                    .map(|sent| sends.borrow_mut().sent(sent))
            }
        };
        match result {
            Ok(()) => {}
            // A sendall that failed has sent an unknown part.
            Err(_) if matches!(call[0] & 0x1f, 6 | 7) => return,
            Err(error) => assert!(is_expected(&error), "{call:?}: {error}"),
        }
    }
}
