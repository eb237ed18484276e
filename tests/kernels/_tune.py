import itertools, os, sys, time
import torch, triton
sys.path.insert(0, os.path.dirname(__file__))
import bench_kernels as B
from mm_core.kernels._triton import attention_decode as AD, attention_prefill as AP
from concurrent.futures import ThreadPoolExecutor
END=time.time()+float(sys.argv[1])
which=sys.argv[2]
def tryit(name, amount, fn, configs):
    got=[]
    for c in configs:
        if time.time()>END: break
        try:
            ms=B.milliseconds(lambda: fn(c)); got.append((amount/ms/1e9, tuple(c)))
        except Exception as e:
            got.append((0, tuple(c)+(type(e).__name__,)))
    got.sort(key=lambda x:-x[0])
    print(name, ' | '.join(f"{v:.2f} {c}" for v,c in got[:9]), flush=True)
def prefill(h,hk,d,b,cfgs):
    L=8192; q,k,v,t,cu,kl=B.paged([L],L,h,hk,d,b); o=torch.empty_like(q)
    tryit(f"prefill {h}/{hk} {d} b{b}",2*h*d*L*L,lambda c:AP.prefill(q,k,v,cu,o,max_q_len=L,scale=d**-.5,causal=True,block_tables=t,kv_lens=kl,tiles=AP.Tiles(*c)),cfgs)
def varlen(n,L,h,d,cfgs):
    q,k,v=B.randn(n*L,3*h,d).split(h,1); cu=torch.arange(0,(n+1)*L,L,device='cuda',dtype=torch.int32); o=torch.empty(n*L,h,d,device='cuda',dtype=B.DTYPE)
    tryit(f"varlen {n}x{L} {d}",4*n*h*d*L*L,lambda c:AP.prefill(q,k,v,cu,o,max_q_len=L,scale=d**-.5,causal=False,tiles=AP.Tiles(*c)),cfgs)
def decode(n,L,h,hk,d,b,cfgs):
    q,k,v,t,cu,kl=B.paged([1]*n,L,h,hk,d,b); o=torch.empty_like(q)
    tryit(f"decode {n}x{L} {h}/{hk} {d} b{b}",4*n*L*hk*d,lambda c:AD.decode(q,k,v,t,cu,kl,o,max_kv_len=L,scale=d**-.5,causal=True,num_splits=c[3],tiles=AD.DecodeTiles(*c[:3])),cfgs)
P=[(128,128,8,3),(64,64,4,3),(64,64,4,2),(64,64,4,4),(64,32,4,4),(64,128,4,3),(64,32,4,3)]
D=[(32,2,4,s) for s in (1,2,3,8,16,32,44,49,64,66,99)]
if which=='p':
    prefill(32,8,128,16,P); prefill(32,8,128,64,P); varlen(1,9216,16,80,P[:4]+[(128,64,8,4)]); varlen(16,729,16,72,P[:4]+[(128,64,8,3)]); prefill(28,4,128,16,P[:3]); varlen(300,64,16,80,[(64,32,4,3),(64,32,4,2),(64,32,4,1),(64,64,4,1)])
else:
    decode(1,32768,32,8,128,16,D[3:]); decode(256,400,10,2,64,16,D[:3]); decode(8,350,32,8,128,16,D[:3]); decode(8,4000,32,8,128,16,D[:5]); decode(1,32768,32,8,128,16,[(64,4,2,s) for s in (32,49,64)])
    import mm_core.kernels._triton.rope as R
    q,k,v=B.randn(16384,48,128).split([32,8,8],dim=1); pos=torch.arange(16384,device='cuda'); tab=B.kernels.build_rope_table(torch.rand(64,device='cuda'),16384)
    def rp(c):
        R.HEADS_PER_PROGRAM=c[0]; R.rope_(q,k,pos,tab,None)
    tryit('rope',8*(q.numel()+k.numel())/2,rp,[(4,),(8,),(16,),(32,)])
