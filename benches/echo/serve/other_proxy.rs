//! Other people's proxies: starts nginx or HAProxy with a configuration made for the job, as a child that ends with this process.
//!
//! Each runs as one process with one thread and logs nothing; nginx without its master, which does nothing while its worker serves.
#![allow(unsafe_code)]

use std::fs;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};

use super::{ListenArgs, cannot};

/// Options of this server.
#[derive(Args)]
pub struct OtherProxyArgs {
    #[command(flatten)]
    listen: ListenArgs,
    /// Whose.
    #[arg(value_enum)]
    program: Program,
    /// Where connections go.
    #[arg(long, value_name = "HOST:PORT")]
    upstream: SocketAddr,
    /// Buffers of the size of --buffer, rather than the program's own choice.
    #[arg(long)]
    large: bool,
    /// By splice(2) where the program finds it worth it.
    #[arg(long)]
    splice: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Program {
    Nginx,
    Haproxy,
}

/// How long it may take to listen.
const START: Duration = Duration::from_secs(10);
/// Where distributions put what is not on everybody's path, and nginx's modules.
const PATHS: [&str; 4] = ["/usr/sbin", "/usr/local/sbin", "/usr/bin", "/usr/local/bin"];
const STREAM_MODULE: [&str; 2] = [
    "/usr/lib/nginx/modules/ngx_stream_module.so",
    "/usr/lib64/nginx/modules/ngx_stream_module.so",
];

/// Serves until this process is killed, and the child with it.
pub fn serve(args: &OtherProxyArgs) -> io::Result<()> {
    args.listen.streams_only()?;
    let name = match args.program {
        Program::Nginx => "nginx",
        Program::Haproxy => "haproxy",
    };
    let program = PATHS.iter().map(|path| Path::new(path).join(name));
    let program = (program.into_iter())
        .find(|path| path.exists())
        .ok_or_else(|| cannot(&format!("{name} is not installed")))?;
    let mut attempts = 0;
    let (mut child, address) = loop {
        match start(args, name, &program) {
            // Somebody else has taken the port.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && attempts < 3 => attempts += 1,
            started => break started?,
        }
    };
    let mut out = io::stdout();
    writeln!(out, "listening on {address}")?;
    out.flush()?;
    let status = child.wait()?;
    Err(io::Error::other(format!("{name} ended: {status}")))
}

/// Starts the program on a port that was free a moment ago; `AddrInUse` if it ended at once.
fn start(args: &OtherProxyArgs, name: &str, program: &Path) -> io::Result<(Child, SocketAddr)> {
    let address = TcpListener::bind(args.listen.bind)?.local_addr()?;
    let directory = Directory::new(name)?;
    let config = directory.0.join("config");
    let text = match args.program {
        Program::Nginx => nginx(args, address, &directory.0, program)?,
        Program::Haproxy => haproxy(args, address),
    };
    fs::write(&config, text)?;
    let mut command = Command::new(program);
    match args.program {
        Program::Nginx => command.arg("-p").arg(&directory.0).arg("-c").arg(&config),
        Program::Haproxy => command.arg("-db").arg("-q").arg("-f").arg(&config),
    };
    command.stdin(Stdio::null()).stdout(Stdio::null());
    // SAFETY: prctl with PR_SET_PDEATHSIG takes a signal number, touches no memory, and may be called between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        })
    };
    let mut child = command.spawn()?;
    wait_until_it_listens(&mut child, address)?;
    drop(directory);
    Ok((child, address))
}

fn wait_until_it_listens(child: &mut Child, address: SocketAddr) -> io::Result<()> {
    let give_up = Instant::now() + START;
    loop {
        // A connection to a port where nobody listens may get that port itself, and be connected to itself.
        let listens = TcpStream::connect(address)
            .and_then(|stream| stream.local_addr())
            .is_ok_and(|local| local != address);
        if listens && child.try_wait()?.is_none() {
            return Ok(());
        }
        if let Some(status) = child.try_wait()? {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                format!("ended at its start: {status}"),
            ));
        }
        if Instant::now() > give_up {
            let _ = child.kill();
            let _ = child.wait();
            return Err(io::Error::other("does not listen"));
        }
        sleep(Duration::from_millis(5));
    }
}

fn nginx(
    args: &OtherProxyArgs,
    address: SocketAddr,
    directory: &Path,
    program: &Path,
) -> io::Result<String> {
    if args.splice {
        return Err(cannot("nginx does not splice"));
    }
    let about = Command::new(program).arg("-V").output()?;
    let about = String::from_utf8_lossy(&about.stderr).into_owned();
    let module = if about.contains("--with-stream=dynamic") {
        let mut places = STREAM_MODULE.iter();
        let module = places
            .find(|path| Path::new(path).exists())
            .ok_or_else(|| cannot("nginx's stream module is not installed"))?;
        format!("load_module {module};")
    } else if about.contains("--with-stream") {
        String::new()
    } else {
        return Err(cannot("nginx was built without its stream module"));
    };
    let buffer = match args.large {
        true => format!("proxy_buffer_size {};", args.listen.buffer),
        false => String::new(),
    };
    let upstream = args.upstream;
    let directory = directory.display();
    Ok(format!(
        "{module}
         daemon off;
         master_process off;
         pid {directory}/pid;
         error_log stderr crit;
         worker_rlimit_nofile 20000;
         events {{ worker_connections 8192; use epoll; multi_accept on; }}
         stream {{
             access_log off;
             server {{
                 listen {address} backlog=4096;
                 tcp_nodelay on;
                 {buffer}
                 proxy_pass {upstream};
             }}
         }}\n"
    ))
}

fn haproxy(args: &OtherProxyArgs, address: SocketAddr) -> String {
    let buffer = match args.large {
        true => format!("tune.bufsize {}", args.listen.buffer),
        false => String::new(),
    };
    let splice = match args.splice {
        true => "option splice-auto",
        false => "",
    };
    let upstream = args.upstream;
    format!(
        "global
            nbthread 1
            maxconn 4000
            {buffer}
        defaults
            mode tcp
            {splice}
            timeout connect 10s
            timeout client 60s
            timeout server 60s
        frontend in
            bind {address} backlog 4096
            default_backend out
        backend out
            server one {upstream}\n"
    )
}

/// A directory for the configuration, which goes once it was read.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> io::Result<Directory> {
        let id = std::process::id();
        let path = std::env::temp_dir().join(format!("ringsock-{name}-{id}"));
        fs::create_dir_all(&path)?;
        Ok(Directory(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
