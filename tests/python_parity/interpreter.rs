//! Executes steps on ringsock. It mirrors `Environment` of record.py: the same helpers, outcomes and placeholders.

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use ringsock::prelude::*;
use ringsock::{
    CreateConnection, CreateServer, Family, Kind, MsgFlags, OptionValue, Result, Timeout, UnixAddr,
    create_connection_with, create_server, create_server_with, has_dualstack_ipv6, socketpair_with,
};

use crate::language::{Action, Call, Expr, parse};

/// What a variable holds and a step evaluates to.
#[derive(Clone, Debug)]
enum Value {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(String),
    Bytes(Vec<u8>),
    Tuple(Vec<Value>),
    Buffer(Arc<Mutex<Vec<u8>>>),
    Socket(Socket),
    /// A descriptor that no socket owns any more, until `adopt` takes it.
    Descriptor(Arc<Mutex<Option<OwnedFd>>>),
}

macro_rules! constants {
    ($($name:ident)*) => {
        fn constant(name: &str) -> Option<i64> {
            match name {
                $(stringify!($name) => Some(i64::from(i32::from(ringsock::$name))),)*
                _ => None,
            }
        }
    };
}

constants! {
    AF_UNSPEC AF_UNIX AF_INET AF_INET6 AF_NETLINK AF_PACKET
    SOCK_STREAM SOCK_DGRAM SOCK_RAW SOCK_RDM SOCK_SEQPACKET SOCK_NONBLOCK SOCK_CLOEXEC
    IPPROTO_IP IPPROTO_TCP IPPROTO_UDP IPPROTO_ICMP IPPROTO_IPV6 IPPROTO_SCTP
    MSG_PEEK MSG_DONTWAIT MSG_TRUNC MSG_WAITALL MSG_OOB MSG_NOSIGNAL MSG_ERRQUEUE MSG_MORE MSG_EOR MSG_DONTROUTE
    SHUT_RD SHUT_WR SHUT_RDWR SOMAXCONN
    SOL_SOCKET SO_REUSEADDR SO_REUSEPORT SO_KEEPALIVE SO_BROADCAST SO_ERROR SO_TYPE SO_LINGER SO_RCVBUF SO_SNDBUF
    SO_ACCEPTCONN SO_DOMAIN SO_PROTOCOL SO_OOBINLINE SO_DONTROUTE SO_RCVLOWAT SO_PASSCRED SO_PRIORITY SO_MARK
    SO_BINDTODEVICE SO_RCVTIMEO SO_SNDTIMEO SO_PEERCRED
    TCP_NODELAY TCP_MAXSEG TCP_KEEPIDLE TCP_KEEPINTVL TCP_KEEPCNT TCP_DEFER_ACCEPT TCP_USER_TIMEOUT TCP_CONGESTION TCP_CORK
    TCP_LINGER2 TCP_SYNCNT TCP_QUICKACK TCP_WINDOW_CLAMP
    IP_TTL IP_TOS IP_MULTICAST_TTL IP_MULTICAST_LOOP IP_ADD_MEMBERSHIP IP_DROP_MEMBERSHIP
    IPV6_V6ONLY IPV6_UNICAST_HOPS IPV6_MULTICAST_HOPS IPV6_MULTICAST_LOOP IPV6_JOIN_GROUP IPV6_LEAVE_GROUP
}

/// The variables of one case, and what its outcomes hide.
pub struct Environment {
    id: String,
    dir: PathBuf,
    variables: HashMap<String, Value>,
    ports: Vec<u16>,
}

impl Environment {
    pub fn new() -> Environment {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let made = MADE.fetch_add(1, Ordering::Relaxed);
        let id = format!(
            "rsp-{:04x}{:04x}",
            std::process::id() % 0x10000,
            made % 0x10000
        );
        let dir = format!("/tmp/{id}");
        // A process that was killed may have left one of that name.
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir).unwrap();
        let name = [b"\0", id.as_bytes()].concat();
        let variables = [
            ("None".to_string(), Value::None),
            ("True".to_string(), Value::Bool(true)),
            ("False".to_string(), Value::Bool(false)),
            ("DIR".to_string(), Value::Str(dir.clone())),
            ("NAME".to_string(), Value::Bytes(name)),
        ];
        Environment {
            id,
            dir: dir.into(),
            variables: variables.into(),
            ports: Vec::new(),
        }
    }

    /// Executes a step: its outcome as one line.
    pub fn outcome(&mut self, step: &str) -> String {
        let outcome = match self.execute(step) {
            Ok(value) => self.show(&value),
            Err(error) => shown_error(&error),
        };
        self.normalised(outcome)
    }

    fn execute(&mut self, step: &str) -> Result<Value> {
        let parsed = parse(step);
        let expr = match parsed.action {
            Action::Evaluate(expr) => expr,
            Action::Delete(name) => {
                self.variables.remove(&name).expect("the variable is there");
                return Ok(Value::None);
            }
        };
        let value = self.evaluate(&expr)?;
        match (&parsed.targets[..], &value) {
            ([], _) => {}
            ([name], _) => drop(self.variables.insert(name.clone(), value.clone())),
            (names, Value::Tuple(items)) => {
                assert_eq!(names.len(), items.len(), "{step}");
                let named = names.iter().cloned().zip(items.iter().cloned());
                self.variables.extend(named);
            }
            _ => panic!("{step}: there is nothing to unpack"),
        }
        Ok(value)
    }

    fn evaluate(&mut self, expr: &Expr) -> Result<Value> {
        Ok(match expr {
            Expr::Int(int) => Value::Int(*int),
            Expr::Float(float) => Value::Float(*float),
            Expr::Str(text) => Value::Str(text.clone()),
            Expr::Bytes(bytes) => Value::Bytes(bytes.clone()),
            Expr::Name(name) => match self.variables.get(name) {
                Some(value) => value.clone(),
                None => Value::Int(constant(name).unwrap_or_else(|| panic!("what is {name}?"))),
            },
            Expr::Tuple(items) => Value::Tuple(self.evaluate_all(items)?),
            Expr::Negative(operand) => match self.evaluate(operand)? {
                Value::Int(int) => Value::Int(-int),
                Value::Float(float) => Value::Float(-float),
                other => panic!("- {other:?}"),
            },
            Expr::Binary(operator, left, right) => {
                match (operator, self.evaluate(left)?, self.evaluate(right)?) {
                    ('|', Value::Int(left), Value::Int(right)) => Value::Int(left | right),
                    ('+', Value::Int(left), Value::Int(right)) => Value::Int(left + right),
                    ('+', Value::Str(left), Value::Str(right)) => Value::Str(left + &right),
                    ('+', Value::Bytes(left), Value::Bytes(right)) => {
                        Value::Bytes([left, right].concat())
                    }
                    ('*', Value::Str(text), Value::Int(n)) => Value::Str(text.repeat(n as usize)),
                    ('*', Value::Bytes(b), Value::Int(n)) => Value::Bytes(b.repeat(n as usize)),
                    other => panic!("{other:?}"),
                }
            }
            Expr::Attribute(object, name) => {
                let socket = self.evaluate(object)?.socket();
                match name.as_str() {
                    "family" => Value::Int(socket.family().bits().into()),
                    "type" => Value::Int(socket.r#type().bits().into()),
                    "proto" => Value::Int(socket.proto().into()),
                    _ => panic!("what is .{name}?"),
                }
            }
            Expr::Index(object, index) => match self.evaluate(object)? {
                Value::Tuple(items) => items[*index].clone(),
                other => panic!("{other:?}[{index}]"),
            },
            Expr::Call(call) => {
                let object = match &call.object {
                    Some(object) => Some(self.evaluate(object)?.socket()),
                    None => None,
                };
                let args = self.evaluate_all(&call.args)?;
                let mut keywords = HashMap::new();
                for (name, expr) in &call.keywords {
                    keywords.insert(name.as_str(), self.evaluate(expr)?);
                }
                match object {
                    Some(socket) => {
                        assert!(keywords.is_empty(), "{}: keywords", call.name);
                        method(&socket, call, &args)?
                    }
                    None => function(&call.name, &args, &keywords)?,
                }
            }
        })
    }

    fn evaluate_all(&mut self, items: &[Expr]) -> Result<Vec<Value>> {
        items.iter().map(|item| self.evaluate(item)).collect()
    }

    fn show(&mut self, value: &Value) -> String {
        match value {
            Value::None => "None".to_string(),
            Value::Bool(true) => "True".to_string(),
            Value::Bool(false) => "False".to_string(),
            Value::Int(int) => int.to_string(),
            Value::Float(float) => format!("{float:?}"),
            Value::Str(text) => shown_str(text),
            Value::Bytes(bytes) => self.shown_bytes(bytes),
            Value::Buffer(buffer) => {
                format!("bytearray({})", self.shown_bytes(&buffer.lock().unwrap()))
            }
            Value::Tuple(items) => {
                if let [Value::Str(_), Value::Int(port @ 1024..=65535), rest @ ..] = &items[..]
                    && [0, 2].contains(&rest.len())
                    && !self.ports.contains(&(*port as u16))
                {
                    self.ports.push(*port as u16);
                }
                let items: Vec<_> = items.iter().map(|item| self.show(item)).collect();
                format!("({})", items.join(", "))
            }
            Value::Socket(socket) => {
                let timeout = socket.gettimeout().map_or(Value::None, Value::Float);
                let (family, kind) = (socket.family().bits(), socket.kind().bits());
                let (proto, timeout) = (socket.proto(), self.show(&timeout));
                format!("<socket {family} {kind} {proto} timeout={timeout}>")
            }
            Value::Descriptor(_) => shown_str("a descriptor"),
        }
    }

    fn shown_bytes(&self, bytes: &[u8]) -> String {
        if bytes.len() <= 80 {
            return shown_bytes(bytes);
        }
        let sum = |bytes: &[u8]| bytes.iter().map(|&byte| u64::from(byte)).sum::<u64>();
        let id = self.id.as_bytes();
        let ids = bytes
            .windows(id.len())
            .filter(|window| *window == id)
            .count() as u64;
        format!("{} bytes, sum {}", bytes.len(), sum(bytes) - ids * sum(id))
    }

    fn normalised(&self, mut text: String) -> String {
        for (index, port) in self.ports.iter().enumerate() {
            text = replaced_word(&text, &port.to_string(), &format!("$port{}", index + 1));
        }
        if let Some((before, after)) = text.split_once(" fd=")
            && let Some((_, rest)) = after.split_once(',').filter(|(number, _)| *number != "-1")
        {
            text = format!("{before} fd=$fd,{rest}");
        }
        let autobound = text
            .strip_prefix("b'\\x00")
            .and_then(|rest| rest.strip_suffix('\''));
        if autobound.is_some_and(|n| n.len() == 5 && n.bytes().all(|b| b.is_ascii_hexdigit())) {
            return "b'\\x00$auto'".to_string();
        }
        text.replace(&self.id, "$id")
    }
}

impl Drop for Environment {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn replaced_word(text: &str, word: &str, by: &str) -> String {
    let mut replaced = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(word) {
        let joins = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        let inside = joins(before.chars().next_back()) || joins(after.chars().next());
        replaced.push_str(before);
        replaced.push_str(if inside { word } else { by });
        rest = after;
    }
    replaced + rest
}

/// The error as record.py shows the exception that Python's documents say it is: class, errno and text.
fn shown_error(error: &Error) -> String {
    let (class, number) = match error {
        Error::Os { errno, .. } => (class_of(*errno), Some(*errno)),
        Error::Message(_) => ("OSError", None),
        Error::Timeout => ("TimeoutError", None),
        Error::Gaierror { code } => ("gaierror", Some(*code)),
        Error::Herror { code } => ("herror", Some(*code)),
        Error::Value(_) => ("ValueError", None),
        Error::Overflow(_) => ("OverflowError", None),
        Error::Type(_) => ("TypeError", None),
        Error::Group(_) => ("ExceptionGroup", None),
        other => panic!("Python has no {other:?}"),
    };
    let number = number.map_or("-".to_string(), |number| number.to_string());
    format!("{class} {number}: {error}")
}

/// PEP 3151.
fn class_of(errno: i32) -> &'static str {
    match errno {
        libc::EAGAIN | libc::EALREADY | libc::EINPROGRESS => "BlockingIOError",
        libc::EPIPE | libc::ESHUTDOWN => "BrokenPipeError",
        libc::ECONNABORTED => "ConnectionAbortedError",
        libc::ECONNREFUSED => "ConnectionRefusedError",
        libc::ECONNRESET => "ConnectionResetError",
        libc::EEXIST => "FileExistsError",
        libc::ENOENT => "FileNotFoundError",
        libc::EINTR => "InterruptedError",
        libc::EISDIR => "IsADirectoryError",
        libc::ENOTDIR => "NotADirectoryError",
        libc::EACCES | libc::EPERM => "PermissionError",
        libc::ETIMEDOUT => "TimeoutError",
        _ => "OSError",
    }
}

fn shown_str(text: &str) -> String {
    let escaped: Vec<_> = text.chars().map(shown_char).collect();
    quoted(&escaped.concat(), text.contains('\''), text.contains('"'))
}

fn shown_bytes(bytes: &[u8]) -> String {
    let shown = |&byte: &u8| match byte {
        0x80.. => format!("\\x{byte:02x}"),
        _ => shown_char(byte.into()),
    };
    let escaped: Vec<_> = bytes.iter().map(shown).collect();
    let has = |quote| bytes.contains(&quote);
    format!("b{}", quoted(&escaped.concat(), has(b'\''), has(b'"')))
}

fn shown_char(c: char) -> String {
    match c {
        '\n' => "\\n".to_string(),
        '\r' => "\\r".to_string(),
        '\t' => "\\t".to_string(),
        '\\' => "\\\\".to_string(),
        '\0'..=' ' if c != ' ' => format!("\\x{:02x}", u32::from(c)),
        '\x7f' => "\\x7f".to_string(),
        c => c.to_string(),
    }
}

/// Python's choice of quotes.
fn quoted(escaped: &str, has_single: bool, has_double: bool) -> String {
    match (has_single, has_double) {
        (true, false) => format!("\"{escaped}\""),
        (true, true) => format!("'{}'", escaped.replace('\'', "\\'")),
        _ => format!("'{escaped}'"),
    }
}

impl Value {
    fn socket(&self) -> Socket {
        match self {
            Value::Socket(socket) => socket.clone(),
            other => panic!("{other:?} is no socket"),
        }
    }

    fn int(&self) -> i64 {
        match self {
            Value::Int(int) => *int,
            Value::Bool(flag) => (*flag).into(),
            other => panic!("{other:?} is no number"),
        }
    }

    fn c_int(&self) -> i32 {
        let int = self.int();
        i32::try_from(int).unwrap_or_else(|_| panic!("{int} cannot be given to ringsock"))
    }

    fn size(&self) -> usize {
        let int = self.int();
        usize::try_from(int).unwrap_or_else(|_| panic!("{int} cannot be given to ringsock"))
    }

    fn flag(&self) -> bool {
        self.int() != 0
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            Value::Bytes(bytes) => bytes.clone(),
            Value::Buffer(buffer) => buffer.lock().unwrap().clone(),
            other => panic!("{other:?} are no bytes"),
        }
    }

    fn text(&self) -> &str {
        match self {
            Value::Str(text) => text,
            other => panic!("{other:?} is no string"),
        }
    }

    fn buffer(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        match self {
            Value::Buffer(buffer) => buffer.lock().unwrap(),
            other => panic!("{other:?} is no buffer"),
        }
    }

    fn timeout(&self) -> Timeout {
        match self {
            Value::None => Timeout::NONE,
            Value::Float(seconds) => (*seconds).into(),
            other => other.int().into(),
        }
    }

    fn family(&self) -> Family {
        Family::new(self.c_int())
    }

    fn kind(&self) -> Kind {
        Kind::new(self.c_int())
    }

    fn flags(&self) -> MsgFlags {
        MsgFlags::new(self.c_int())
    }

    fn is_same(&self, other: &Value) -> bool {
        match (self, other) {
            (Value::Tuple(left), Value::Tuple(right)) => {
                let mut pairs = left.iter().zip(right);
                left.len() == right.len() && pairs.all(|(left, right)| left.is_same(right))
            }
            (Value::None, Value::None) => true,
            (Value::Int(left), Value::Int(right)) => left == right,
            (Value::Str(left), Value::Str(right)) => left == right,
            (Value::Bytes(left), Value::Bytes(right)) => left == right,
            (Value::Float(left), Value::Float(right)) => left == right,
            _ => false,
        }
    }
}

/// Python's form of an address is ringsock's, but for the tuple of three, which is one of four here.
impl ToAddress for Value {
    fn to_address(&self, family: Family) -> Result<Address> {
        match self {
            Value::Str(path) => path.to_address(family),
            Value::Bytes(path) => path.to_address(family),
            Value::Tuple(items) => {
                let number = |index: usize| match items.get(index) {
                    Some(item) => {
                        u32::try_from(item.int()).expect("a number ringsock can be given")
                    }
                    None => 0,
                };
                let port = u16::try_from(number(1)).expect("a port ringsock can be given");
                match items.len() {
                    2 => (items[0].text(), port).to_address(family),
                    _ => (items[0].text(), port, number(2), number(3)).to_address(family),
                }
            }
            other => panic!("{other:?} is no address"),
        }
    }

    fn to_stream_addresses(&self) -> Result<Vec<Address>> {
        match self {
            Value::Tuple(items) if items.len() == 2 => {
                let port = u16::try_from(items[1].int()).expect("a port ringsock can be given");
                (items[0].text(), port).to_stream_addresses()
            }
            other => Ok(vec![other.to_address(ringsock::prelude::AF_UNSPEC)?]),
        }
    }
}

impl From<Address> for Value {
    fn from(address: Address) -> Value {
        match address {
            Address::V4(v4) => Value::Tuple(vec![
                Value::Str(v4.ip().to_string()),
                Value::Int(v4.port().into()),
            ]),
            Address::V6(v6) => Value::Tuple(vec![
                Value::Str(v6.ip().to_string()),
                Value::Int(v6.port().into()),
                Value::Int(v6.flowinfo().into()),
                Value::Int(v6.scope_id().into()),
            ]),
            Address::Unix(UnixAddr::Unnamed) => Value::Str(String::new()),
            Address::Unix(UnixAddr::Path(path)) => Value::Str(path.to_str().unwrap().to_string()),
            Address::Unix(UnixAddr::Abstract(name)) => {
                Value::Bytes([&b"\0"[..], &name[..]].concat())
            }
            Address::Raw { family, data } => {
                Value::Tuple(vec![Value::Int(family.bits().into()), Value::Bytes(data)])
            }
            other => panic!("what is {other:?}?"),
        }
    }
}

impl From<Option<Address>> for Value {
    fn from(address: Option<Address>) -> Value {
        address.map_or(Value::None, Value::from)
    }
}

fn integer(number: usize) -> Value {
    Value::Int(number as i64)
}

fn pair(first: Value, second: Value) -> Value {
    Value::Tuple(vec![first, second])
}

fn descriptor(fd: OwnedFd) -> Value {
    Value::Descriptor(Arc::new(Mutex::new(Some(fd))))
}

fn method(s: &Socket, call: &Call, args: &[Value]) -> Result<Value> {
    let name = call.name.as_str();
    Ok(match (name, args) {
        ("recv", [n]) => Value::Bytes(s.recv(n.size())?.into()),
        ("recv", [n, flags]) => Value::Bytes(s.recv_with(n.size(), flags.flags())?.into()),
        ("recv_into", [buffer]) => integer(s.recv_into(&mut buffer.buffer())?),
        ("recv_into", [buffer, n, rest @ ..]) => {
            let flags = rest.first().map_or(MsgFlags::default(), Value::flags);
            integer(s.recv_into_with(&mut buffer.buffer(), n.size(), flags)?)
        }
        ("recvfrom", [n]) => {
            let (bytes, address) = s.recvfrom(n.size())?;
            pair(Value::Bytes(bytes.into()), address.into())
        }
        ("recvfrom", [n, flags]) => {
            let (bytes, address) = s.recvfrom_with(n.size(), flags.flags())?;
            pair(Value::Bytes(bytes.into()), address.into())
        }
        ("recvfrom_into", [buffer]) => {
            let (received, address) = s.recvfrom_into(&mut buffer.buffer())?;
            pair(integer(received), address.into())
        }
        ("recvfrom_into", [buffer, n, rest @ ..]) => {
            let flags = rest.first().map_or(MsgFlags::default(), Value::flags);
            let mut buffer = buffer.buffer();
            let (received, address) = s.recvfrom_into_with(&mut buffer, n.size(), flags)?;
            pair(integer(received), address.into())
        }
        ("send", [bytes]) => integer(s.send(&bytes.bytes())?),
        ("send", [bytes, flags]) => integer(s.send_with(&bytes.bytes(), flags.flags())?),
        ("sendall", [bytes]) => {
            s.sendall(&bytes.bytes())?;
            Value::None
        }
        ("sendall", [bytes, flags]) => {
            s.sendall_with(&bytes.bytes(), flags.flags())?;
            Value::None
        }
        ("sendto", [bytes, address]) => integer(s.sendto(&bytes.bytes(), address)?),
        ("sendto", [bytes, flags, address]) => {
            integer(s.sendto_with(&bytes.bytes(), flags.flags(), address)?)
        }
        ("accept", []) => {
            let (socket, address) = s.accept()?;
            pair(Value::Socket(socket), address.into())
        }
        ("bind", [address]) => {
            s.bind(address)?;
            Value::None
        }
        ("listen", [backlog]) => {
            s.listen(backlog.c_int())?;
            Value::None
        }
        ("connect", [address]) => {
            s.connect(address)?;
            Value::None
        }
        ("connect_ex", [address]) => Value::Int(s.connect_ex(address)?.into()),
        ("close", []) => {
            s.close()?;
            Value::None
        }
        ("detach", []) => descriptor(s.clone().detach()?),
        ("dup", []) => Value::Socket(s.dup()?),
        ("fileno", []) => Value::Int(s.fileno().into()),
        ("getsockname", []) => s.getsockname()?.into(),
        ("getpeername", []) => s.getpeername()?.into(),
        ("shutdown", [how]) => {
            s.shutdown(how.c_int())?;
            Value::None
        }
        ("settimeout", [timeout]) => {
            s.settimeout(timeout.timeout())?;
            Value::None
        }
        ("gettimeout", []) => s.gettimeout().map_or(Value::None, Value::Float),
        ("setblocking", [flag]) => {
            s.setblocking(flag.flag())?;
            Value::None
        }
        ("getblocking", []) => Value::Bool(s.getblocking()),
        ("get_inheritable", []) => Value::Bool(s.get_inheritable()?),
        ("set_inheritable", [flag]) => {
            s.set_inheritable(flag.flag())?;
            Value::None
        }
        ("getsockopt", [level, option]) => {
            Value::Int(s.getsockopt(level.c_int(), option.c_int())?.into())
        }
        ("getsockopt", [level, option, len]) => {
            Value::Bytes(s.getsockopt_buf(level.c_int(), option.c_int(), len.size())?)
        }
        ("setsockopt", [level, option, value, len @ ..]) => {
            let bytes;
            let value = match (value, len) {
                (Value::None, [len]) => OptionValue::Null(len.size() as u32),
                (Value::Bytes(value), []) => {
                    bytes = value.clone();
                    OptionValue::Bytes(&bytes)
                }
                (value, _) => OptionValue::Int(value.c_int()),
            };
            s.setsockopt(level.c_int(), option.c_int(), value)?;
            Value::None
        }
        _ => panic!("{name}({args:?}): ringsock has no such method"),
    })
}

fn function(name: &str, args: &[Value], keywords: &HashMap<&str, Value>) -> Result<Value> {
    Ok(match (name, args) {
        ("socket", rest) => {
            let family = rest.first().map_or(AF_INET, Value::family);
            let kind = rest.get(1).map_or(SOCK_STREAM, Value::kind);
            let proto = rest.get(2).map_or(0, Value::c_int);
            Value::Socket(Socket::new(family, kind, proto)?)
        }
        ("socketpair", rest) => {
            let family = rest.first().map_or(AF_UNIX, Value::family);
            let kind = rest.get(1).map_or(SOCK_STREAM, Value::kind);
            let proto = rest.get(2).map_or(0, Value::c_int);
            let (left, right) = socketpair_with(family, kind, proto)?;
            pair(Value::Socket(left), Value::Socket(right))
        }
        ("create_server", [address]) if keywords.is_empty() => {
            Value::Socket(create_server(address)?)
        }
        ("create_server", [address]) => {
            let mut options = CreateServer::default();
            for (name, value) in keywords {
                match *name {
                    "family" => options.family = value.family(),
                    "backlog" => options.backlog = Some(value.c_int()),
                    "reuse_port" => options.reuse_port = value.flag(),
                    "dualstack_ipv6" => options.dualstack_ipv6 = value.flag(),
                    _ => panic!("what is {name}?"),
                }
            }
            Value::Socket(create_server_with(address, options)?)
        }
        ("create_connection", [address]) => {
            let timeout = keywords.get("timeout").map(Value::timeout);
            let source_address = keywords.get("source_address");
            let all_errors = keywords.get("all_errors").is_some_and(Value::flag);
            let options = CreateConnection {
                timeout,
                source_address: source_address.map(|value| value as &dyn ToAddress),
                all_errors,
                ..CreateConnection::default()
            };
            Value::Socket(create_connection_with(address, options)?)
        }
        ("has_dualstack_ipv6", []) => Value::Bool(has_dualstack_ipv6()),
        ("bytearray", [Value::Int(len)]) => {
            Value::Buffer(Arc::new(Mutex::new(vec![0; *len as usize])))
        }
        ("bytearray", [bytes]) => Value::Buffer(Arc::new(Mutex::new(bytes.bytes()))),
        ("bytes", [buffer]) => Value::Bytes(buffer.bytes()),
        ("len", [bytes]) => integer(bytes.bytes().len()),
        ("float", [text]) => Value::Float(text.text().parse().unwrap()),
        ("repr", [socket]) => Value::Str(format!("{:?}", socket.socket())),
        // The helpers of record.py.
        ("tcp_pair", rest) => {
            let family = rest.first().map_or(AF_INET, Value::family);
            let host = if family == AF_INET {
                "127.0.0.1"
            } else {
                "::1"
            };
            let options = CreateServer {
                family,
                ..Default::default()
            };
            let server = create_server_with((host, 0), options)?;
            let client = ringsock::create_connection(server.getsockname()?)?;
            pair(Value::Socket(client), Value::Socket(server.accept()?.0))
        }
        ("fd", [Value::Int(number)]) if *number < 0 => Value::Int(*number),
        ("fd", [Value::Int(_) | Value::Descriptor(_)]) => Value::Str("a descriptor".to_string()),
        ("flags", [socket]) => Value::Str(descriptor_flags(&socket.socket())),
        ("readable", [socket]) => {
            ringsock::wait_readable(socket.socket())?;
            Value::Bool(true)
        }
        ("writable", [socket]) => {
            ringsock::wait_writable(socket.socket())?;
            Value::Bool(true)
        }
        ("fromfd", [socket, family, kind, rest @ ..]) => {
            let fd = socket.socket().as_fd().try_clone_to_owned().unwrap();
            let proto = rest.first().map_or(0, Value::c_int);
            Value::Socket(Socket::from_fd_with(
                fd,
                family.family(),
                kind.kind(),
                proto,
            )?)
        }
        ("adopt", [Value::Descriptor(fd), rest @ ..]) => {
            let fd = fd.lock().unwrap().take().expect("nobody has taken it");
            Value::Socket(match rest {
                [family, kind, proto] => {
                    Socket::from_fd_with(fd, family.family(), kind.kind(), proto.c_int())?
                }
                _ => Socket::from_fd(fd)?,
            })
        }
        ("fill", [socket, unit]) => {
            let unit = vec![b'x'; unit.size()];
            let socket = socket.socket();
            loop {
                match socket.send_with(&unit, MSG_DONTWAIT) {
                    Err(error) if error.is_would_block() => return Ok(Value::None),
                    sent => sent?,
                };
            }
        }
        ("between", [low, number, high]) => {
            Value::Bool((low.int()..=high.int()).contains(&number.int()))
        }
        ("same", [left, right]) => Value::Bool(left.is_same(right)),
        ("within", [name, length]) => {
            let name = name.text();
            let padding = length.size() - name.len() - 1;
            Value::Str(format!("{name}/{}", "x".repeat(padding)))
        }
        _ => panic!("{name}({args:?}): there is no such function"),
    })
}

fn descriptor_flags(socket: &Socket) -> String {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", socket.fileno())).unwrap();
    let line = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let value = i32::from_str_radix(line.unwrap().trim(), 8).unwrap();
    let names = [
        ("O_NONBLOCK", libc::O_NONBLOCK),
        ("O_CLOEXEC", libc::O_CLOEXEC),
    ];
    let set = names.iter().filter(|(_, flag)| value & flag != 0);
    set.map(|(name, _)| *name).collect::<Vec<_>>().join("|")
}
