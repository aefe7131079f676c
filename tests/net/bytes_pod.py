"""interim byte pod"""
import fcntl,termios,asyncio,socket,sys,os,json,array,struct,random
sys.path.insert(0,os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0,'/work/main/tests/net')
from bytes_client import pattern,piece
from midstream_runtime.contract import handoff as wire
class Conn:
    def __init__(s,sock,st=None):
        s.sock=sock; s.id=id(s); s.st=st or dict(head="",up=-1,upo=0,down=0,downo=0,seed=0,pause=0,chunk=1000,bad="",tail=0); s.on=False; s.timer=None
    def start(s):
        s.on=True; s.loop=asyncio.get_running_loop(); s.loop.add_reader(s.sock.fileno(),s.read); s.kick()
    def stop(s):
        s.on=False; s.loop.remove_reader(s.sock.fileno()); s.loop.remove_writer(s.sock.fileno())
        if s.timer: s.timer.cancel(); s.timer=None
    def close(s): s.stop(); s.sock.close(); conns.pop(s.id,None)
    def read(s):
        t=s.st
        try: d=s.sock.recv(65536)
        except BlockingIOError: return
        except OSError: return s.close()
        if not d: s.loop.remove_reader(s.sock.fileno()); return
        if t['up']<0:
            t['head']+=d.decode('latin1'); 
            if '\n' not in t['head']: return
            h,rest=t['head'].split('\n',1); j=json.loads(h); t.update(seed=j['seed'],up=j['up'],down=j['down'],pause=j['pause'],chunk=j['chunk'],head=''); d=rest.encode('latin1'); s.kick()
        pat=pattern(t['seed']) if not hasattr(s,'pu') else s.pu; s.pu=pat
        at=0
        while at<len(d):
            w=piece(pat,t['upo']+at,len(d)-at)
            if d[at:at+len(w)]!=w and not t['bad']: t['bad']=f"upload differs at {t['upo']+at}"
            at+=len(w)
        t['upo']+=len(d); s.finish()
    def kick(s):
        if s.on and s.st['up']>=0: s.loop.add_writer(s.sock.fileno(),s.write)
    def finish(s):
        if s.st['upo']>=s.st['up'] and s.st['downo']>=s.st['down']: s.kick()
    def write(s):
        t=s.st
        if not hasattr(s,'pd'): s.pd=pattern(t['seed']+1)
        try:
            if t['downo']<t['down']:
                t['downo']+=s.sock.send(piece(s.pd,t['downo'],min(t['chunk'],t['down']-t['downo'])))
                if t['pause'] and random.random()<.3:
                    s.loop.remove_writer(s.sock.fileno()); s.timer=s.loop.call_later(random.uniform(0,t['pause']),s.kick)
            elif t['upo']>=t['up']:
                m=(t['bad'] or 'OK').encode()[t['tail']:]
                if m: t['tail']+=s.sock.send(m)
                if t['tail']>=len((t['bad'] or 'OK')):
                    s.loop.remove_writer(s.sock.fileno())
                    if struct.unpack('i',fcntl.ioctl(s.sock.fileno(),termios.TIOCOUTQ,b'\0'*4))[0]==0: s.close()
                    else: s.timer=s.loop.call_later(.005,s.kick)
            else: s.loop.remove_writer(s.sock.fileno())
        except BlockingIOError: pass
        except OSError: s.close()
conns={}; jobs={}
async def frames(c,w):pass
def main():
    port=int(sys.argv[1])
    async def run():
        loop=asyncio.get_running_loop()
        ls=socket.socket(socket.AF_INET6); ls.setsockopt(socket.SOL_SOCKET,socket.SO_REUSEADDR,1); ls.setsockopt(socket.IPPROTO_IPV6,socket.IPV6_V6ONLY,0)
        ls.bind(('::',port)); ls.listen(4096); ls.setblocking(False)
        def acc():
            n=0
            while True:
                try: k,_=ls.accept()
                except BlockingIOError: return n
                k.setblocking(False); c=Conn(k); conns[c.id]=c; c.start(); n+=1
        loop.add_reader(ls.fileno(),acc)
        path=os.environ.get('MIDSTREAM_HANDOFF','/run/midstream/handoff.sock')
        hs=socket.socket(socket.AF_UNIX); hs.bind(path); hs.listen(); hs.setblocking(False)
        print('ready',flush=True)
        while True:
            k,_=await loop.sock_accept(hs); k.setblocking(False); asyncio.ensure_future(serve(k,acc))
    def addr(c): 
        a=c.sock.getsockname(); return [a[0].removeprefix('::ffff:'),a[1]]
    async def send(k,h,p=b'',fds=()):
        fds=list(fds); first=True
        while first or fds:
            first=False; part,fds=fds[:253],fds[253:]
            d=wire.encode({**h,'fds':len(part),'more':bool(fds)},b'' if fds else p)
            n=k.sendmsg([d],[(socket.SOL_SOCKET,socket.SCM_RIGHTS,array.array('i',part))] if part else [])
            await asyncio.get_running_loop().sock_sendall(k,d[n:])
    async def serve(k,acc):
        loop=asyncio.get_running_loop(); buf=bytearray()
        while True:
            while wire.missing(buf)>0:
                d=await loop.sock_recv(k,65536)
                if not d: k.close(); return
                buf+=d
            h,p,n=wire.decode(buf); del buf[:n]; kind=h['kind']; i=h['id']; job=h.get('job')
            r={'id':i,'kind':kind}; fds=[]; pl=b''
            if kind=='hello': r.update(version=1,min_version=1,pod_kind='bytes',model=None,listeners=[{'address':'::','port':port,'family':6}],pool=None)
            elif kind=='settle': r['accepted']=acc()
            elif kind=='streams': r['streams']=[{'id':c.id,'local':addr(c),'remote':list(c.sock.getpeername()[:2]),'movable':True,'reason':'','state':'x','tokens':0,'kv_bytes':0} for c in conns.values() if addr(c)[0] in h['addresses']]
            elif kind=='pause':
                if job not in jobs:
                    ex=set(h.get('exclude',[])); cs=[c for c in conns.values() if addr(c)[0] in h['addresses'] and c.id not in ex]
                    for c in cs: c.stop()
                    jobs[job]=cs
                cs=jobs[job]; r['streams']=[{'id':c.id} for c in cs]; r['kv']=[]; pl=json.dumps([c.st for c in cs]).encode(); fds=[c.sock.fileno() for c in cs]
            elif kind=='resume':
                for c in jobs.pop(job,[]): c.start()
            elif kind=='release':
                for c in jobs.pop(job,[]): c.sock.close(); conns.pop(c.id,None)
            elif kind=='blank':
                jobs[job]=[socket.socket(socket.AF_INET if f==4 else socket.AF_INET6) for f in h['families']]
                for s in jobs[job]: s.setblocking(False)
                fds=[s.fileno() for s in jobs[job]]
            elif kind=='stage': jobs[job]=[Conn(s,st) for s,st in zip(jobs[job],json.loads(p))]
            elif kind=='activate':
                for c in jobs.pop(job): conns[c.id]=c; c.start()
            elif kind=='discard':
                for c in jobs.pop(job,[]): (c.sock if isinstance(c,Conn) else c).close()
            elif kind=='fds': fds=[(c.sock if isinstance(c,Conn) else c).fileno() for c in jobs.get(job,[])]
            await send(k,r,pl,fds)
    asyncio.run(run())
main()
