//! What must not compile: ways for a fiber, or what it holds, to cross threads. Each case stands beside one that differs only in
//! the point and does compile, so that it fails for its reason and no other.

/// A closure that is not `Send` starts on its own worker only.
///
/// ```
/// let runtime = ringsock::Runtime::builder().build().unwrap();
/// let shared = std::sync::Arc::new(7);
/// runtime.handle().spawn(move || drop(shared)).unwrap();
/// ```
///
/// ```compile_fail,E0277
/// let runtime = ringsock::Runtime::builder().build().unwrap();
/// let shared = std::rc::Rc::new(7);
/// runtime.handle().spawn(move || drop(shared)).unwrap();
/// ```
///
/// ```compile_fail,E0277
/// let runtime = ringsock::Runtime::builder().build().unwrap();
/// let shared = std::rc::Rc::new(7);
/// runtime.handle().spawn_on(0, move || drop(shared)).unwrap();
/// ```
struct ClosureFromOutside;

/// Nor does a result that is not `Send` leave its worker.
///
/// ```
/// let runtime = ringsock::Runtime::builder().build().unwrap();
/// runtime.handle().spawn(|| std::sync::Arc::new(7)).unwrap();
/// ```
///
/// ```compile_fail,E0277
/// let runtime = ringsock::Runtime::builder().build().unwrap();
/// runtime.handle().spawn(|| std::rc::Rc::new(7)).unwrap();
/// ```
struct ResultToOutside;

/// The handle of a fiber crosses threads only with a result that may.
///
/// ```
/// ringsock::run(|| {
///     let fiber = ringsock::spawn(|| std::sync::Arc::new(7));
///     std::thread::spawn(move || drop(fiber.join()));
/// });
/// ```
///
/// ```compile_fail,E0277
/// ringsock::run(|| {
///     let fiber = ringsock::spawn(|| std::rc::Rc::new(7));
///     std::thread::spawn(move || drop(fiber.join()));
/// });
/// ```
struct HandleToAnotherThread;

/// A fiber may outlive the frame that started it, so it borrows nothing from there.
///
/// ```
/// ringsock::run(|| {
///     let buffer = vec![0u8; 16];
///     ringsock::spawn(move || buffer.len());
/// });
/// ```
///
/// ```compile_fail,E0373
/// ringsock::run(|| {
///     let buffer = vec![0u8; 16];
///     ringsock::spawn(|| buffer.len());
/// });
/// ```
struct BorrowByAFiber;

/// The handler of `serve` runs on every worker.
///
/// ```
/// let runtime = ringsock::Runtime::builder().build().unwrap();
/// let shared = std::sync::Arc::new(7);
/// runtime.handle().serve(("127.0.0.1", 0), move |_, _| *shared).unwrap();
/// ```
///
/// ```compile_fail,E0277
/// let runtime = ringsock::Runtime::builder().build().unwrap();
/// let shared = std::rc::Rc::new(7);
/// runtime.handle().serve(("127.0.0.1", 0), move |_, _| *shared).unwrap();
/// ```
struct HandlerOfServe;
