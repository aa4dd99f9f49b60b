import sys,hashlib,torch
from functools import partial
torch.set_num_threads(1)
from argonne.models import ArgonneConfig, ArgonneModel, Batch, CrossEntropyLoss, Execution, build_replicas
from argonne.parallel import *
from argonne.parallel.communication.collectives import all_gather
from argonne.parallel.pipeline_parallel.plan import PipelinePlan
from argonne.training.optimizer import build_optimizer
from argonne.training.step import Learner, train_step
from argonne.training.run.setup import PRECISIONS
from argonne.checkpoint.pieces import weight_pieces, moment_pieces

def run(groups, tied=True, kind="replicate", schedule="1f1b", precision="fp32", blocks=4, steps=3, M=4, b=2, S=64, docs=False, recompute=False, kv=4, layers=4):
    config=ArgonneConfig(64, layers, 8, kv, 1003, max_position_embeddings=S, tie_word_embeddings=tied, intermediate_size=160)
    plan=PipelinePlan.of(schedule, groups.pipeline.size)
    ex=Execution(groups, PRECISIONS[precision], plan=plan, reproducible=blocks, recompute=recompute)
    model,replicas=build_replicas(partial(ArgonneModel,config), ex, kind)
    groups=ex.groups
    L=Learner(model=model,replicas=replicas,optimizer=build_optimizer(replicas.parameters,weight_decay=0.1))
    L.initialise(0)
    g=torch.Generator().manual_seed(1)
    D,d=groups.data.size,groups.data.rank
    A=M//D
    out=[]
    for s in range(steps):
        ids=torch.randint(0,1003,(M,b,S+1),generator=g)
        if kind=="fsdp": mine=ids[d::D]
        else: mine=ids[d*A:(d+1)*A]
        doc=None
        if docs: doc=(torch.arange(S)//17).expand(A,b,S).contiguous()
        r=train_step(L, Batch(mine[...,:-1].contiguous(),mine[...,1:].contiguous(),doc,divisor=M*b*S) if docs else Batch(mine[...,:-1].contiguous(),mine[...,1:].contiguous(),divisor=M*b*S), CrossEntropyLoss(), 1e-2, 1.0)
        out.append((r.loss,r.norm))
    parts=[(p.region,p.part.clone()) for p in weight_pieces(L.parameters)]+[(__import__('dataclasses').replace(p.region,name=p.name),p.part.clone()) for p in moment_pieces(L.optimizer,L.parameters)]
    return out,parts

def grads(groups, o):
    import argonne.training.step as st
    got={}
    orig=st.clip_gradients
    def spy(parameters,norm,limit,scale):
        from argonne.parallel.sharding.region import Region
        if not got:
            got['p']=[(r,r.part_of(s.parameter.grad).clone()) for s in parameters for r in s.spec.regions if 0 not in r.shape]
        return orig(parameters,norm,limit,scale)
    st.clip_gradients=spy
    run(groups,steps=1,**o)
    st.clip_gradients=orig
    return got['p']
def body(groups, o): return run(groups, **o)
