/* An RPC server for a board that has no Python: TVM's runtime does the talking, this program the housekeeping.
 *
 * Each session runs in a process of its own, so a kernel that crashes or hangs takes only its session along: the
 * client is told what happened, and the next one is served. Uploads go into a folder that ends with the session.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <ftw.h>
#include <getopt.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

enum {
    SESSION_MAGIC = 0xFF271,
    SESSION_MISMATCH = SESSION_MAGIC + 2,
    TRACKER_MAGIC = 0x2F271,
    TRACKER_PUT = 3,
    TRACKER_UPDATE_INFO = 5,
    TRACKER_PENDING_KEYS = 7,
};
enum {
    IO_SECONDS = 10,        /* to wait for one answer */
    HANDSHAKE_SECONDS = 5,  /* for a client to say who it is */
    LOOK_MS = 2000,         /* between two looks at the tracker */
    UNUSED_LOOKS = 4,       /* after which a key that was lent and not used is given anew */
    GRACE_MS = 2000,        /* for a session to end once its client is gone */
    RETRY_SECONDS = 2,
    MOST_KEYS = 1 << 20,
};

typedef struct {
    int port;
    char tracker_host[256];
    char tracker_port[8];
    char key[64];
    bool once;
} Options;

typedef struct {
    int client;
    double seconds; /* the client's limit, 0 for none */
} Session;

static Options options = {.port = 9090, .key = "any"};
static int tracker = -1;
static char match_key[128];
static char folder[4096];
static volatile sig_atomic_t asked_to_end;

static void say(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
    fflush(stdout);
}

static void fail(const char* what, const char* why) {
    fprintf(stderr, "rpc-server: %s: %s\n", what, why);
    exit(2);
}

static double now_ms(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return 1e3 * (double)time.tv_sec + 1e-6 * (double)time.tv_nsec;
}

/* Sockets ------------------------------------------------------------- */

static void limit(int fd, int seconds) {
    struct timeval time = {.tv_sec = seconds};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &time, sizeof time);
}

/* A peer whose power was cut says nothing: find that out within half a minute. */
static void keep_alive(int fd) {
    int on = 1, idle = 10, interval = 5, count = 4;
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof count);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

static bool send_all(int fd, const void* data, size_t size) {
    const char* next = data;
    while (size) {
        ssize_t sent = send(fd, next, size, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) continue;
        if (sent <= 0) return false;
        next += sent;
        size -= (size_t)sent;
    }
    return true;
}

static bool receive_all(int fd, void* data, size_t size) {
    char* next = data;
    while (size) {
        ssize_t received = recv(fd, next, size, 0);
        if (received < 0 && errno == EINTR) continue;
        if (received <= 0) return false;
        next += received;
        size -= (size_t)received;
    }
    return true;
}

static int listen_on(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (fd < 0 || bind(fd, (struct sockaddr*)&address, sizeof address) || listen(fd, 8)) {
        fail("cannot listen", strerror(errno));
    }
    socklen_t length = sizeof address;
    getsockname(fd, (struct sockaddr*)&address, &length);
    options.port = ntohs(address.sin_port);
    return fd;
}

/* The tracker ----------------------------------------------------------- */

static void tracker_close(void) {
    if (tracker >= 0) close(tracker);
    tracker = -1;
}

/* One question and its answer, which the caller frees; NULL when the tracker is lost. */
static char* tracker_ask(const char* format, ...) {
    char question[512];
    va_list arguments;
    va_start(arguments, format);
    int32_t length = vsnprintf(question, sizeof question, format, arguments);
    va_end(arguments);
    char* answer = NULL;
    bool sent = send_all(tracker, &length, sizeof length) && send_all(tracker, question, (size_t)length);
    if (sent && receive_all(tracker, &length, sizeof length) && length > 0 && length <= MOST_KEYS) {
        answer = calloc(1, (size_t)length + 1);
        if (answer && receive_all(tracker, answer, (size_t)length)) return answer;
    }
    free(answer);
    tracker_close();
    return NULL;
}

static bool tracker_agrees(char* answer) {
    free(answer);
    return answer != NULL;
}

static int tracker_connected(void) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = NULL;
    if (getaddrinfo(options.tracker_host, options.tracker_port, &hints, &found)) return -1;
    int fd = -1;
    for (struct addrinfo* at = found; at && fd < 0; at = at->ai_next) {
        fd = socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        limit(fd, IO_SECONDS); /* on Linux also a limit for connecting */
        if (connect(fd, at->ai_addr, at->ai_addrlen)) {
            close(fd);
            fd = -1;
        }
    }
    freeaddrinfo(found);
    return fd;
}

static bool tracker_open(void) {
    int32_t magic = TRACKER_MAGIC;
    tracker = tracker_connected();
    if (tracker < 0) return false;
    keep_alive(tracker);
    if (!send_all(tracker, &magic, sizeof magic) || !receive_all(tracker, &magic, sizeof magic) ||
        magic != TRACKER_MAGIC) {
        tracker_close();
        return false;
    }
    return tracker_agrees(tracker_ask("[%d, {\"key\": \"server:%s\", \"addr\": [null, %d]}]", TRACKER_UPDATE_INFO,
                                      options.key, options.port));
}

/* Offer ourselves for one session, under a key that nobody has seen. */
static bool tracker_offer(void) {
    uint32_t random[2];
    if (getrandom(random, sizeof random, 0) != sizeof random) return false;
    snprintf(match_key, sizeof match_key, "%s:%08x%08x", options.key, random[0], random[1]);
    return tracker_agrees(
        tracker_ask("[%d, \"%s\", [%d, \"%s\"], null]", TRACKER_PUT, options.key, options.port, match_key));
}

/* A client that was sent to us may never come: count the looks at which our key was lent, and offer another. */
static bool tracker_look(int* unused) {
    char* keys = tracker_ask("[%d]", TRACKER_PENDING_KEYS);
    if (!keys) return false;
    *unused = strstr(keys, match_key) ? 0 : *unused + 1;
    free(keys);
    if (*unused < UNUSED_LOOKS) return true;
    *unused = 0;
    return tracker_offer();
}

static void tracker_find(void) {
    bool said = false;
    while (tracker < 0 && !asked_to_end && !tracker_open()) {
        if (!said) say("waiting for a tracker at %s:%s", options.tracker_host, options.tracker_port);
        said = true;
        sleep(RETRY_SECONDS);
    }
}

/* Clients --------------------------------------------------------------- */

static bool answer_key(int client) {
    char key[80];
    int32_t code = SESSION_MAGIC, length = snprintf(key, sizeof key, "server:%s", options.key);
    return send_all(client, &code, sizeof code) && send_all(client, &length, sizeof length) &&
           send_all(client, key, (size_t)length);
}

/* Whether a client is the one that the tracker has sent, and how long it may stay. */
static bool greet(int client, Session* session) {
    char said[256] = "", expected[160];
    int32_t magic, length, mismatch = SESSION_MISMATCH;
    if (!receive_all(client, &magic, sizeof magic) || magic != SESSION_MAGIC) return false;
    if (!receive_all(client, &length, sizeof length) || length <= 0 || length >= (int32_t)sizeof said) return false;
    if (!receive_all(client, said, (size_t)length)) return false;
    snprintf(expected, sizeof expected, "client:%s", match_key);
    size_t size = strlen(expected);
    if (strncmp(said, expected, size) || (said[size] && said[size] != ' ')) {
        send_all(client, &mismatch, sizeof mismatch);
        return false;
    }
    const char* limit_option = strstr(said, " -timeout=");
    double seconds = limit_option ? strtod(limit_option + strlen(" -timeout="), NULL) : 0.0;
    *session = (Session){client, seconds};
    return answer_key(client);
}

/* The next session; false when the tracker was lost meanwhile, or we are to end. */
static bool await_session(int listener, Session* session) {
    int unused = 0;
    while (!asked_to_end) {
        struct pollfd ready[2] = {{listener, POLLIN, 0}, {tracker, POLLIN, 0}};
        int count = poll(ready, 2, LOOK_MS);
        if (count < 0) continue;
        if (ready[1].revents) { /* it never speaks unasked: it is gone */
            tracker_close();
            return false;
        }
        if (count == 0 && tracker >= 0 && !tracker_look(&unused)) return false;
        if (!(ready[0].revents & POLLIN)) continue;
        int client = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (client < 0) continue;
        limit(client, HANDSHAKE_SECONDS);
        if (greet(client, session)) {
            limit(client, 0);
            keep_alive(client);
            return true;
        }
        close(client);
    }
    return false;
}

/* What TVM's runtime asks of a server ------------------------------------ */

static TVMFFIByteArray text_of(const TVMFFIAny* value) {
    switch (value->type_index) {
        case kTVMFFIRawStr:
            return (TVMFFIByteArray){value->v_c_str, strlen(value->v_c_str)};
        case kTVMFFISmallStr:
            return (TVMFFIByteArray){value->v_bytes, value->small_str_len};
        case kTVMFFIStr:
            return *(const TVMFFIByteArray*)((const char*)value->v_obj + sizeof(TVMFFIObject));
        default:
            return (TVMFFIByteArray){NULL, 0};
    }
}

/* The path of an upload: a plain name, in the session's folder. */
static bool path_of(const TVMFFIAny* arguments, int32_t count, char* path, size_t size) {
    TVMFFIByteArray name = count == 1 ? text_of(arguments) : (TVMFFIByteArray){NULL, 0};
    bool plain = name.size && name.size < 256 && !memchr(name.data, '/', name.size) && name.data[0] != '.';
    if (plain) snprintf(path, size, "%s/%.*s", folder, (int)name.size, name.data);
    else TVMFFIErrorSetRaisedFromCStr("ValueError", "a file's name must be plain");
    return plain;
}

static int work_path(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result) {
    (void)self;
    char path[sizeof folder + 260];
    if (!path_of(arguments, count, path, sizeof path)) return -1;
    return TVMFFIStringFromByteArray(&(TVMFFIByteArray){path, strlen(path)}, result);
}

static TVMFFIObjectHandle global_function(const char* name) {
    TVMFFIObjectHandle function = NULL;
    TVMFFIFunctionGetGlobal(&(TVMFFIByteArray){name, strlen(name)}, &function);
    if (!function) fail("the TVM runtime beside this program lacks a function", name);
    return function;
}

static int load_module(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result) {
    (void)self;
    char path[sizeof folder + 260];
    if (!path_of(arguments, count, path, sizeof path)) return -1;
    TVMFFIAny argument = {.type_index = kTVMFFIRawStr, .v_c_str = path};
    return TVMFFIFunctionCall(global_function("ffi.ModuleLoadFromFile"), &argument, 1, result);
}

static void provide(const char* name, TVMFFISafeCallType function) {
    TVMFFIObjectHandle handle = NULL;
    TVMFFIByteArray text = {name, strlen(name)};
    if (TVMFFIFunctionCreate(NULL, function, NULL, &handle) || TVMFFIFunctionSetGlobal(&text, handle, 1)) {
        fail("cannot register a function", name);
    }
}

/* A kind of device, where its part of the runtime lies beside this program. A session that uses it starts the driver. */
static bool load_device(const char* name, const char* trouble) {
    char path[4096];
    ssize_t length = readlink("/proc/self/exe", path, sizeof path - strlen(name) - 1);
    while (length > 0 && path[length - 1] != '/') length--;
    if (length <= 0) return false;
    snprintf(path + length, sizeof path - (size_t)length, "%s", name);
    if (access(path, F_OK)) return false;
    if (!dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE)) fail(trouble, dlerror());
    return true;
}

/* Sessions ---------------------------------------------------------------- */

static int remove_one(const char* path, const struct stat* status, int flag, struct FTW* base) {
    (void)status, (void)flag, (void)base;
    return remove(path);
}

static void make_folder(void) {
    const char* parent = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/saevit-rpc-XXXXXX", parent && *parent ? parent : "/tmp");
    if (!mkdtemp(folder)) fail("cannot create a folder for uploads", strerror(errno));
}

static void serve(int client, const sigset_t* mask, pid_t parent) {
    signal(SIGCHLD, SIG_DFL);
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
    sigprocmask(SIG_SETMASK, mask, NULL);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent || chdir(folder)) _exit(1);
    TVMFFIAny argument = {.type_index = kTVMFFIInt, .v_int64 = client}, result = {0};
    /* Without the destructors of the runtime and of what was loaded into it: they have crashed before. */
    _exit(TVMFFIFunctionCall(global_function("rpc.ServerLoop"), &argument, 1, &result) ? 1 : 0);
}

/* Wait until a session is over, or end it: when its client is gone, its time is up, or we are to stop.
 * Gives what the client should be told, NULL for nothing. */
static const char* attend(pid_t child, const Session* session, const sigset_t* mask, char* words, size_t size) {
    struct pollfd client = {session->client, POLLRDHUP, 0};
    double end = session->seconds > 0 ? now_ms() + 1e3 * session->seconds : 0.0;
    bool gone = false;
    int status;
    while (waitpid(child, &status, WNOHANG) != child) {
        if (asked_to_end || (end > 0 && now_ms() >= end)) {
            kill(child, SIGKILL);
            waitpid(child, &status, 0);
            snprintf(words, size, "RPCSessionTimeoutError: the session's %g s are over", session->seconds);
            return gone || asked_to_end ? NULL : words;
        }
        struct timespec wait = {.tv_nsec = 200000000}; /* a child that ends is heard of at once */
        if (ppoll(&client, 1, &wait, mask) > 0) {
            gone = true;
            client.fd = -1;
            end = now_ms() + GRACE_MS;
        }
    }
    if (!WIFSIGNALED(status) || gone) return NULL;
    snprintf(words, size, "the kernel crashed: %s", strsignal(WTERMSIG(status)));
    return words;
}

static void tell(int client, const char* words) {
    TVMFFIAny arguments[2] = {{.type_index = kTVMFFIInt, .v_int64 = client},
                              {.type_index = kTVMFFIRawStr, .v_c_str = words}};
    TVMFFIAny result = {0};
    TVMFFIFunctionCall(global_function("rpc.ReturnException"), arguments, 2, &result);
}

static bool run(const Session* session, int listener, const sigset_t* mask) {
    char buffer[128];
    make_folder();
    pid_t parent = getpid(), child = fork();
    if (child == 0) {
        close(listener);
        tracker_close();
        serve(session->client, mask, parent);
    }
    const char* words = child > 0 ? attend(child, session, mask, buffer, sizeof buffer) : "the server cannot fork";
    if (words) {
        limit(session->client, HANDSHAKE_SECONDS);
        tell(session->client, words);
        say("%s", words);
    }
    close(session->client);
    nftw(folder, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    return words == NULL;
}

/* The command line ---------------------------------------------------------- */

static void usage(int status) {
    fprintf(status ? stderr : stdout,
            "usage: rpc-server [--port PORT] [--tracker HOST:PORT] [--key KEY] [--once]\n"
            "Serves TVM's RPC, one session at a time. PORT 0 is any free one (default 9090).\n");
    exit(status);
}

static int number(const char* text) {
    char* end;
    long value = strtol(text, &end, 10);
    if (!*text || *end || value < 0 || value > 65535) fail("not a port", text);
    return (int)value;
}

static void take_tracker(const char* text) {
    const char* colon = strrchr(text, ':');
    size_t length = colon ? (size_t)(colon - text) : 0;
    bool brackets = length > 2 && text[0] == '[' && text[length - 1] == ']';
    if (!length || length >= sizeof options.tracker_host || number(colon + 1) == 0) fail("not HOST:PORT", text);
    snprintf(options.tracker_host, sizeof options.tracker_host, "%.*s", (int)length - 2 * brackets, text + brackets);
    snprintf(options.tracker_port, sizeof options.tracker_port, "%d", number(colon + 1));
}

static void take_key(const char* text) {
    size_t plain = strspn(text, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-");
    if (!*text || text[plain] || strlen(text) >= sizeof options.key) fail("not a key (letters, digits, _.-)", text);
    snprintf(options.key, sizeof options.key, "%s", text);
}

static void parse(int count, char** arguments) {
    static const struct option known[] = {{"port", 1, 0, 'p'}, {"tracker", 1, 0, 't'}, {"key", 1, 0, 'k'},
                                          {"once", 0, 0, 'o'}, {"help", 0, 0, 'h'},    {0}};
    int option;
    while ((option = getopt_long(count, arguments, "h", known, NULL)) != -1) {
        if (option == 'p') options.port = number(optarg);
        else if (option == 't') take_tracker(optarg);
        else if (option == 'k') take_key(optarg);
        else if (option == 'o') options.once = true;
        else usage(option == 'h' ? 0 : 2);
    }
    if (optind < count) usage(2);
}

static void note_end(int number) {
    (void)number;
    asked_to_end = 1;
}

static void note_child(int number) { (void)number; }

static void take_signals(sigset_t* before) {
    struct sigaction end = {.sa_handler = note_end}, child = {.sa_handler = note_child};
    sigset_t blocked;
    sigaction(SIGINT, &end, NULL);
    sigaction(SIGTERM, &end, NULL);
    sigaction(SIGCHLD, &child, NULL);
    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGCHLD); /* heard in ppoll only, so that none is missed */
    sigprocmask(SIG_BLOCK, &blocked, before);
}

int main(int count, char** arguments) {
    sigset_t mask;
    parse(count, arguments);
    take_signals(&mask);
    provide("tvm.rpc.server.workpath", work_path);
    provide("tvm.rpc.server.load_module", load_module);
    global_function("tvm.contrib.random.random_fill_for_measure");
    bool opencl = load_device("libsaevit_opencl.so", "the plugin for OpenCL cannot be loaded");
    bool cuda = load_device("libtvm_runtime_cuda.so", "CUDA cannot be loaded: is NVIDIA's driver installed?");
    int listener = listen_on(options.port);
    say("serving on port %d with the key %s%s", options.port, options.key, opencl ? ", with OpenCL" : cuda ? ", with CUDA" : "");
    while (!asked_to_end) {
        Session session;
        if (*options.tracker_host) tracker_find();
        else snprintf(match_key, sizeof match_key, "%s", options.key);
        if (tracker >= 0 && !tracker_offer()) continue;
        if (!await_session(listener, &session)) continue;
        bool well = run(&session, listener, &mask);
        if (options.once) return well ? 0 : 1;
    }
    return 0;
}
